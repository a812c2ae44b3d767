/* Causal depthwise convolution: x is read once, y written once; the taps slide over rows in the cache.

   A task is a segment of one row's tokens in a block of channels. Rows that a token does not see (another
   document's) are read as zeros. */
#include "native.h"

/* Rows of local arrays are ROW apart, so that they do not all fall into the same few sets of the cache. */
enum { MAX_WIDTH = 16, CHANNELS = 512, ROW = CHANNELS + 16, SEGMENT = 256 };
static const float zeros[CHANNELS];

typedef struct {
    int64_t threads, batch, length, channels, width, activation;
    tensor x, before, weight, bias, starts; /* B T C, B W-1 C, C W, C, B T (bytes) */
    tensor y;                               /* B T C */
    tensor dy, dx, dbefore, partial;        /* B T C, B T C, B W-1 C, (B segments) W+1 C fp32 */
} conv_args;

typedef struct {
    int64_t row, start, stop, segment, channel, count; /* tokens start .. stop - 1, `count` channels from `channel` */
} piece;

static int64_t channel_block(const conv_args *a) {
    int64_t blocks = blocks_of(a->channels, CHANNELS);
    return smaller(CHANNELS, (blocks_of(a->channels, blocks) + 15) / 16 * 16);
}

static piece piece_of(const conv_args *a, int64_t index) {
    int64_t block = channel_block(a), blocks = blocks_of(a->channels, block);
    int64_t segments = blocks_of(a->length, SEGMENT);
    piece p = {.channel = index % blocks * block, .segment = index / blocks};
    p.row = p.segment / segments;
    p.start = p.segment % segments * SEGMENT;
    p.stop = smaller(p.start + SEGMENT, a->length);
    p.count = smaller(block, a->channels - p.channel);
    return p;
}

static int64_t tasks_of(const conv_args *a) {
    return a->batch * blocks_of(a->length, SEGMENT) * blocks_of(a->channels, channel_block(a));
}

static void load_taps(const conv_args *a, piece p, float taps[][ROW], float *bias) {
    for (int64_t k = 0; k < a->width; k++)
        for (int64_t c = 0; c < p.count; c++)
            taps[k][c] = get(&a->weight, (p.channel + c) * a->weight.stride[0] + k);
    for (int64_t c = 0; c < p.count; c++) bias[c] = a->bias.data ? get(&a->bias, p.channel + c) : 0.0f;
}

/* The input at token t, which may lie before the first, in the block's channels. */
static const float *input(const conv_args *a, piece p, int64_t t, float *room) {
    int64_t lags = a->width - 1;
    if (t >= 0) return load(&a->x, p.row * a->x.stride[0] + t * a->x.stride[1] + p.channel, room, p.count);
    int64_t offset = p.row * a->before.stride[0] + (t + lags) * a->before.stride[1] + p.channel;
    return load(&a->before, offset, room, p.count);
}

/* How many of the width - 1 tokens before t belong to its document. */
static int64_t seen(const conv_args *a, piece p, int64_t t) {
    const uint8_t *starts = (const uint8_t *)a->starts.data;
    int64_t lag = 0;
    if (!starts) return a->width - 1;
    starts += p.row * a->starts.stride[0];
    while (lag < a->width - 1 && !(t - lag >= 0 && starts[t - lag])) lag++;
    return lag;
}

/* out = bias + sum_k rows[k] taps[k] */
static void weigh(float *restrict out, const float *restrict bias, const float *const *rows,
                  float taps[][ROW], int64_t width, int64_t n) {
    if (width == 4) {
        const float *restrict r0 = rows[0], *restrict r1 = rows[1], *restrict r2 = rows[2], *restrict r3 = rows[3];
        for (int64_t c = 0; c < n; c++)
            out[c] = bias[c] + r3[c] * taps[3][c] + r0[c] * taps[0][c] + r1[c] * taps[1][c] + r2[c] * taps[2][c];
        return;
    }
    memcpy(out, bias, (size_t)n * sizeof(float));
    for (int64_t k = 0; k < width; k++) {
        const float *restrict row = rows[k], *restrict tap = taps[k];
        for (int64_t c = 0; c < n; c++) out[c] += row[c] * tap[c];
    }
}

/* The rows that token t's taps read, oldest first; `ring` holds every token's row at its place modulo width. */
static void rows_of(const conv_args *a, piece p, int64_t t, const float *const *ring, const float **rows) {
    int64_t lags = a->width - 1, visible = seen(a, p, t);
    for (int64_t k = 0; k <= lags; k++)
        rows[k] = lags - k <= visible ? ring[(t - lags + k + a->width) % a->width] : zeros;
}

static void forward_piece(const void *arguments, int64_t index, float *scratch) {
    const conv_args *a = arguments;
    piece p = piece_of(a, index);
    float taps[MAX_WIDTH][ROW], bias[CHANNELS], room[MAX_WIDTH][ROW], out_room[CHANNELS];
    const float *ring[MAX_WIDTH], *rows[MAX_WIDTH];
    int64_t width = a->width, lags = width - 1;
    (void)scratch;
    load_taps(a, p, taps, bias);
    for (int64_t t = p.start - lags; t < p.stop; t++) {
        int64_t at = (t + width) % width;
        ring[at] = input(a, p, t, room[at]);
        if (t < p.start) continue;
        rows_of(a, p, t, ring, rows);
        int64_t offset = p.row * a->y.stride[0] + t * a->y.stride[1] + p.channel;
        float *restrict y = place(&a->y, offset, out_room);
        weigh(y, bias, rows, taps, width, p.count);
        if (a->activation)
            for (int64_t c = 0; c < p.count; c++) y[c] *= sigmoid(y[c]);
        store(&a->y, offset, y, p.count);
    }
}

void conv_forward(const conv_args *a) { run_tasks(forward_piece, a, tasks_of(a), 0, a->threads); }

/* d = dy silu'(u) */
static void through_silu(float *restrict d, const float *restrict dy, const float *restrict u, int64_t n) {
    for (int64_t c = 0; c < n; c++) {
        float s = sigmoid(u[c]);
        d[c] = dy[c] * s * (1.0f + u[c] * (1.0f - s));
    }
}

/* dtaps[k] += rows[k] d, dbias += d */
static void accumulate(float dtaps[][ROW], const float *const *rows, const float *restrict d, int64_t width,
                       int64_t n) {
    float *restrict dbias = dtaps[width];
    for (int64_t k = 0; k < width; k++) {
        const float *restrict row = rows[k];
        float *restrict dtap = dtaps[k];
        for (int64_t c = 0; c < n; c++) dtap[c] += row[c] * d[c];
    }
    for (int64_t c = 0; c < n; c++) dbias[c] += d[c];
}

static void backward_piece(const void *arguments, int64_t index, float *scratch) {
    const conv_args *a = arguments;
    piece p = piece_of(a, index);
    int64_t width = a->width, lags = width - 1, n = p.count;
    float taps[MAX_WIDTH][ROW], bias[CHANNELS], dtaps[MAX_WIDTH + 1][ROW], sums[CHANNELS];
    float room[MAX_WIDTH][ROW], d[MAX_WIDTH][ROW], dy_room[CHANNELS], out_room[CHANNELS];
    const float *ring[MAX_WIDTH], *rows[MAX_WIDTH];
    float reversed[MAX_WIDTH][ROW];
    int64_t visible[MAX_WIDTH];
    (void)scratch;
    load_taps(a, p, taps, bias);
    for (int64_t k = 0; k < width; k++) memcpy(reversed[k], taps[lags - k], sizeof(taps[0]));
    memset(dtaps, 0, sizeof(dtaps));
    memset(d, 0, sizeof(d));
    memset(visible, 0, sizeof(visible));
    for (int64_t t = p.start - lags; t < p.start; t++) {
        int64_t at = (t + width) % width;
        ring[at] = input(a, p, t, room[at]);
    }
    /* A token's gradient is complete once those of the `lags` tokens that read it are known: beyond the segment's
       end they are computed again, beyond the last token they are zero. */
    for (int64_t t = p.start; t < p.stop + lags; t++) {
        int64_t at = t % width;
        visible[at] = -1;
        if (t < a->length) {
            ring[at] = input(a, p, t, room[at]);
            rows_of(a, p, t, ring, rows);
            visible[at] = seen(a, p, t);
            const float *dy = load(&a->dy, p.row * a->dy.stride[0] + t * a->dy.stride[1] + p.channel, dy_room, n);
            if (a->activation) {
                weigh(sums, bias, rows, taps, width, n);
                through_silu(d[at], dy, sums, n);
            } else memcpy(d[at], dy, (size_t)n * sizeof(float));
            if (t < p.stop) accumulate(dtaps, rows, d[at], width, n);
        }
        int64_t s = t - lags; /* now complete */
        if (s < p.start && p.start > 0) continue;
        for (int64_t lag = 0; lag <= lags; lag++) {
            int64_t reader = (s + lag + width) % width;
            rows[lag] = s + lag >= 0 && lag <= visible[reader] ? d[reader] : zeros;
        }
        const tensor *to = s < 0 ? &a->dbefore : &a->dx;
        int64_t offset = p.row * to->stride[0] + (s < 0 ? s + lags : s) * to->stride[1] + p.channel;
        float *out = place(to, offset, out_room);
        weigh(out, zeros, rows, reversed, width, n);
        store(to, offset, out, n);
    }
    for (int64_t k = 0; k <= width; k++)
        memcpy(floats(&a->partial, (p.segment * (width + 1) + k) * a->channels + p.channel), dtaps[k],
               (size_t)n * sizeof(float));
}

void conv_backward(const conv_args *a) { run_tasks(backward_piece, a, tasks_of(a), 0, a->threads); }
