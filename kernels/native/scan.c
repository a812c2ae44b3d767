/* The chunked scan between its matrix products (kernels/ssd). b c g k q p n: batch, chunk, group, head of the group,
   token of the chunk, channel, state. A cell is one (b, c, g). */
#include <math.h>

#include "native.h"

static const float SMALLEST_BITS = -60.0f, SMALLEST_INSERT = 1e-30f; /* as in kernels/ssd/passes.py */
enum { TOKENS = 16 };

typedef struct {
    int64_t batch, chunks, groups, heads, tokens;
} sizes;

typedef struct {
    int64_t b, c, g;
} cell;

static cell cell_of(const sizes *s, int64_t index) {
    return (cell){index / (s->chunks * s->groups), index / s->groups % s->chunks, index % s->groups};
}

static int64_t cells(const sizes *s) { return s->batch * s->chunks * s->groups; }

/* Offset of (b, c, g, i, j, 0). */
static int64_t at(const tensor *t, cell o, int64_t i, int64_t j) {
    return o.b * t->stride[0] + o.c * t->stride[1] + o.g * t->stride[2] + i * t->stride[3] + j * t->stride[4];
}

static void put(const tensor *t, int64_t offset, float value) { write_row(t, offset, &value, 1); }

/* ---- Everything that depends on the decays and insertion weights alone ---- */

typedef struct {
    int64_t threads;
    sizes s;
    tensor log_decay, insert, starts;              /* b c g q k fp32, b c q bytes or NULL */
    tensor bits, bits_rest, clamped, to_end;       /* b c g k q fp32 */
    tensor kept, kept_rest;                        /* b c g k fp32 */
    tensor inward, outward;                        /* b c g q k 1 */
} weights_args;

static void weights_cell(const void *arguments, int64_t index, float *scratch) {
    const weights_args *a = arguments;
    const int64_t Q = a->s.tokens;
    cell o = cell_of(&a->s, index);
    const uint8_t *starts = (const uint8_t *)a->starts.data;
    if (starts) starts += o.b * a->starts.stride[0] + o.c * a->starts.stride[1];
    int64_t first = Q, last = 0; /* the chunk's first and last document start */
    for (int64_t q = Q - 1; starts && q >= 0; q--)
        if (starts[q]) {
            if (first == Q) last = q;
            first = q;
        }
    double *sums = (double *)scratch;
    for (int64_t k = 0; k < a->s.heads; k++) {
        double sum = 0.0;
        for (int64_t q = 0; q < Q; q++) sums[q] = sum += get(&a->log_decay, at(&a->log_decay, o, q, k));
        float *bits = floats(&a->bits, at(&a->bits, o, k, 0)), *rest = floats(&a->bits_rest, at(&a->bits_rest, o, k, 0));
        float *clamped = floats(&a->clamped, at(&a->clamped, o, k, 0)), *to_end = floats(&a->to_end, at(&a->to_end, o, k, 0));
        for (int64_t q = 0; q < Q; q++) {
            double exact = sums[q] * 1.4426950408889634;
            float insert = get(&a->insert, at(&a->insert, o, q, k));
            bits[q] = (float)exact;
            rest[q] = (float)(exact - bits[q]);
            clamped[q] = insert < SMALLEST_INSERT ? SMALLEST_INSERT : insert;
            to_end[q] = q < last ? 0.0f : (float)exp(sum - sums[q]);
            put(&a->inward, at(&a->inward, o, q, k), q < first ? (float)exp(sums[q]) : 0.0f);
            put(&a->outward, at(&a->outward, o, q, k), to_end[q] * insert);
        }
        double retention = first < Q ? 0.0 : exp(sum);
        float kept = (float)retention;
        uint32_t word;
        memcpy(&word, &kept, 4);
        word = (word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000; /* 8 bits */
        memcpy(&kept, &word, 4);
        *floats(&a->kept, at(&a->kept, o, k, 0)) = kept;
        *floats(&a->kept_rest, at(&a->kept_rest, o, k, 0)) = (float)(retention - kept);
    }
}

void scan_weights(const weights_args *a) { run_tasks(weights_cell, a, cells(&a->s), 2 * a->s.tokens, a->threads); }

/* ---- Scaling, and the two orders of tokens and heads ---- */

typedef struct {
    int64_t threads;
    sizes s;
    int64_t channels;
    tensor x, weight, other;      /* b c g q k p, b c g q k 1, b c g q k p or NULL */
    tensor scaled, per_head, dot; /* b c g q k p, b c g k q p, b c g k q fp32 or NULL */
} split_args;

static int64_t token_tasks(const sizes *s) { return cells(s) * blocks_of(s->tokens, TOKENS); }

static void split_tokens(const void *arguments, int64_t index, float *scratch) {
    const split_args *a = arguments;
    const int64_t P = a->channels, blocks = blocks_of(a->s.tokens, TOKENS), start = index % blocks * TOKENS;
    cell o = cell_of(&a->s, index / blocks);
    for (int64_t q = start; q < smaller(start + TOKENS, a->s.tokens); q++)
        for (int64_t k = 0; k < a->s.heads; k++) {
            const float *restrict x = load(&a->x, at(&a->x, o, q, k), scratch, P);
            float weight = get(&a->weight, at(&a->weight, o, q, k));
            int64_t to = at(&a->scaled, o, q, k);
            float *restrict scaled = place(&a->scaled, to, scratch + P);
            for (int64_t p = 0; p < P; p++) scaled[p] = x[p] * weight;
            store(&a->scaled, to, scaled, P);
            write_row(&a->per_head, at(&a->per_head, o, k, q), x, P);
            if (!a->other.data) continue;
            const float *restrict other = load(&a->other, at(&a->other, o, q, k), scratch + 2 * P, P);
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < P; p++) sum += scaled[p] * other[p];
            *floats(&a->dot, at(&a->dot, o, k, q)) = sum;
        }
}

void scan_split(const split_args *a) { run_tasks(split_tokens, a, token_tasks(&a->s), 3 * a->channels, a->threads); }

typedef struct {
    int64_t threads;
    sizes s;
    int64_t channels;
    tensor near, far, weight;  /* b c g k q p, b c g q k p, b c g q k 1 */
    tensor out;                /* b c g q k p */
    tensor x, to_end, leaving; /* b c g q k p or NULL, b c g k q fp32, b c g k q fp32 */
} join_args;

static void join_tokens(const void *arguments, int64_t index, float *scratch) {
    const join_args *a = arguments;
    const int64_t P = a->channels, blocks = blocks_of(a->s.tokens, TOKENS), start = index % blocks * TOKENS;
    cell o = cell_of(&a->s, index / blocks);
    for (int64_t q = start; q < smaller(start + TOKENS, a->s.tokens); q++)
        for (int64_t k = 0; k < a->s.heads; k++) {
            const float *restrict near = load(&a->near, at(&a->near, o, k, q), scratch, P);
            const float *restrict far = load(&a->far, at(&a->far, o, q, k), scratch + P, P);
            float weight = get(&a->weight, at(&a->weight, o, q, k));
            int64_t to = at(&a->out, o, q, k);
            float *restrict out = place(&a->out, to, scratch + 2 * P);
            for (int64_t p = 0; p < P; p++) out[p] = near[p] + far[p] * weight;
            store(&a->out, to, out, P);
            if (!a->x.data) continue;
            const float *restrict x = load(&a->x, at(&a->x, o, q, k), scratch + 3 * P, P);
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < P; p++) sum += x[p] * far[p];
            *floats(&a->leaving, at(&a->leaving, o, k, q)) = sum * *floats(&a->to_end, at(&a->to_end, o, k, q));
        }
}

void scan_join(const join_args *a) { run_tasks(join_tokens, a, token_tasks(&a->s), 4 * a->channels, a->threads); }

/* ---- The serial recurrence over chunks ---- */

typedef struct {
    int64_t threads;
    sizes s;
    int64_t size, backwards;     /* p n; from the last chunk */
    tensor state, added;         /* b g k (p n) fp32, b c g k (p n) */
    tensor kept, kept_rest;      /* b c g k fp32 */
    tensor before, after;        /* b c g k (p n): the state before each addition; b g k (p n) fp32: after the last */
    tensor other, dot;           /* b c g k (p n) or NULL: summed with `before` into b c g k fp32 */
} recur_args;

static void recur_head(const void *arguments, int64_t index, float *scratch) {
    const recur_args *a = arguments;
    const int64_t n = a->size, K = a->s.heads;
    cell o = {index / (a->s.groups * K), 0, index / K % a->s.groups};
    int64_t k = index % K;
    float *restrict state = floats(&a->after, index * n), *added_room = scratch, *other_room = scratch + n;
    memcpy(state, floats(&a->state, index * n), (size_t)n * sizeof(float));
    for (int64_t i = 0; i < a->s.chunks; i++) {
        o.c = a->backwards ? a->s.chunks - 1 - i : i;
        const float *restrict added = load(&a->added, at(&a->added, o, k, 0), added_room, n);
        float kept = *floats(&a->kept, at(&a->kept, o, k, 0)), rest = *floats(&a->kept_rest, at(&a->kept_rest, o, k, 0));
        if (a->other.data) {
            const float *restrict other = load(&a->other, at(&a->other, o, k, 0), other_room, n);
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++) sum += state[j] * other[j];
            *floats(&a->dot, at(&a->dot, o, k, 0)) = sum;
        }
        write_row(&a->before, at(&a->before, o, k, 0), state, n);
        for (int64_t j = 0; j < n; j++) state[j] = added[j] + state[j] * rest + state[j] * kept;
    }
}

void scan_recur(const recur_args *a) {
    run_tasks(recur_head, a, a->s.batch * a->s.groups * a->s.heads, 2 * a->size, a->threads);
}

/* ---- What a token takes of those before it in its chunk ---- */

typedef struct {
    int64_t threads;
    sizes s;
    tensor scores;                  /* b c g q r */
    tensor bits, bits_rest, insert; /* b c g k q fp32 */
    tensor starts, D;               /* b c q bytes or NULL, heads fp32 */
    tensor mixer;                   /* b c g k q r; in the backward pass dmixer on entry */
    tensor dscores, excess, columns, dD; /* b c g q r, b c g k q fp32 (twice), b c g k fp32 */
} mixer_args;

/* The first token of q's document in the chunk. */
static int64_t document(const mixer_args *a, cell o, int64_t q) {
    const uint8_t *starts = (const uint8_t *)a->starts.data;
    if (!starts) return 0;
    starts += o.b * a->starts.stride[0] + o.c * a->starts.stride[1];
    while (q > 0 && !starts[q]) q--;
    return q;
}

static int64_t rounded_up(int64_t q, int64_t Q) { return smaller((q / TOKENS + 1) * TOKENS, Q); }

static inline float retention(float bits_q, float rest_q, float bits_r, float rest_r) {
    float kept = bits_q - bits_r + rest_q - rest_r;
    kept = kept < SMALLEST_BITS ? SMALLEST_BITS : kept;
    kept = kept > 0.0f ? 0.0f : kept;
    return exp2_fast(kept);
}

static void mixer_head(const void *arguments, int64_t index, float *scratch) {
    const mixer_args *a = arguments;
    const int64_t Q = a->s.tokens, k = index % a->s.heads;
    cell o = cell_of(&a->s, index / a->s.heads);
    const float *restrict bits = floats(&a->bits, at(&a->bits, o, k, 0));
    const float *restrict rest = floats(&a->bits_rest, at(&a->bits_rest, o, k, 0));
    const float *restrict insert = floats(&a->insert, at(&a->insert, o, k, 0));
    float D = get(&a->D, o.g * a->s.heads + k);
    for (int64_t q = 0; q < Q; q++) {
        int32_t low = (int32_t)document(a, o, q), high = (int32_t)q, stop = (int32_t)rounded_up(q, Q);
        const float *restrict score = load(&a->scores, at(&a->scores, o, q, 0), scratch, stop);
        int64_t to = at(&a->mixer, o, k, q);
        float *restrict row = place(&a->mixer, to, scratch + Q), bits_q = bits[q], rest_q = rest[q];
        for (int32_t r = 0; r < stop; r++) {
            float v = retention(bits_q, rest_q, bits[r], rest[r]) * insert[r] * score[r];
            row[r] = (r >= low) & (r <= high) ? v : 0.0f;
        }
        row[q] += D;
        memset(row + stop, 0, (size_t)(Q - stop) * sizeof(float));
        store(&a->mixer, to, row, Q);
    }
}

void scan_mixer(const mixer_args *a) {
    run_tasks(mixer_head, a, cells(&a->s) * a->s.heads, 2 * a->s.tokens, a->threads);
}

/* From dmixer: the mixer (in its place), the scores' gradient summed over heads, and of E = dmixer * retention *
   insert * scores the column sums, and row sums less column sums: without the diagonal, which cancels exactly. */
static void mixer_backward_cell(const void *arguments, int64_t index, float *scratch) {
    const mixer_args *a = arguments;
    const int64_t Q = a->s.tokens;
    cell o = cell_of(&a->s, index);
    float *dscores = scratch, *scores = scratch + Q * Q, *restrict column = scratch + 2 * Q * Q, *room = column + Q;
    memset(dscores, 0, (size_t)(Q * Q) * sizeof(float));
    for (int64_t k = 0; k < a->s.heads; k++) {
        const float *restrict bits = floats(&a->bits, at(&a->bits, o, k, 0));
        const float *restrict rest = floats(&a->bits_rest, at(&a->bits_rest, o, k, 0));
        const float *restrict insert = floats(&a->insert, at(&a->insert, o, k, 0));
        float *excess = floats(&a->excess, at(&a->excess, o, k, 0)), *columns = floats(&a->columns, at(&a->columns, o, k, 0));
        float D = get(&a->D, o.g * a->s.heads + k), dD = 0.0f;
        memset(column, 0, (size_t)Q * sizeof(float));
        for (int64_t q = 0; q < Q; q++) {
            int32_t low = (int32_t)document(a, o, q), high = (int32_t)q, stop = (int32_t)rounded_up(q, Q);
            int64_t from = at(&a->mixer, o, k, q);
            const float *restrict score = load(&a->scores, at(&a->scores, o, q, 0), scores + q * Q, stop);
            float *restrict row = (float *)load(&a->mixer, from, room, stop), *restrict dscore = dscores + q * Q;
            float bits_q = bits[q], rest_q = rest[q], sum = 0.0f, diagonal = row[q];
#pragma omp simd reduction(+ : sum)
            for (int32_t r = 0; r < stop; r++) {
                int seen = (r >= low) & (r <= high), off = (r >= low) & (r < high);
                float weight = retention(bits_q, rest_q, bits[r], rest[r]) * insert[r];
                float d = row[r] * weight, e = off ? d * score[r] : 0.0f;
                dscore[r] += seen ? d : 0.0f;
                column[r] += e;
                sum += e;
                row[r] = seen ? weight * score[r] : 0.0f;
            }
            row[q] += D;
            memset(row + stop, 0, (size_t)(Q - stop) * sizeof(float));
            store(&a->mixer, from, row, Q);
            dD += diagonal;
            excess[q] = sum;
            columns[q] = diagonal * insert[q] * score[q];
        }
        for (int64_t q = 0; q < Q; q++) {
            excess[q] -= column[q];
            columns[q] += column[q];
        }
        *floats(&a->dD, at(&a->dD, o, k, 0)) = dD;
    }
    for (int64_t q = 0; q < Q; q++) write_row(&a->dscores, at(&a->dscores, o, q, 0), dscores + q * Q, Q);
}

void scan_mixer_backward(const mixer_args *a) {
    const int64_t Q = a->s.tokens;
    run_tasks(mixer_backward_cell, a, cells(&a->s), 2 * Q * Q + 2 * Q, a->threads);
}

/* ---- Gradients of log decays and insertion weights, gathered ---- */

typedef struct {
    int64_t threads;
    sizes s;
    tensor excess, columns, reading, leaving, dgain; /* b c g k q fp32 (four), b c g k fp32 */
    tensor insert, kept, kept_rest;                  /* b c g k q, b c g k (twice), fp32 */
    tensor dlog_decay, dinsert;                      /* b c g q k fp32 */
} decay_args;

static void decay_cell(const void *arguments, int64_t index, float *scratch) {
    const decay_args *a = arguments;
    const int64_t Q = a->s.tokens;
    cell o = cell_of(&a->s, index);
    for (int64_t k = 0; k < a->s.heads; k++) {
        int64_t head = at(&a->excess, o, k, 0), one = at(&a->kept, o, k, 0); /* all contiguous alike */
        const float *excess = floats(&a->excess, head), *columns = floats(&a->columns, head);
        const float *reading = floats(&a->reading, head), *leaving = floats(&a->leaving, head);
        const float *insert = floats(&a->insert, at(&a->insert, o, k, 0));
        float total = 0.0f;
        for (int64_t q = 0; q < Q; q++) total += leaving[q] * insert[q];
        float kept = *floats(&a->kept, one) + *floats(&a->kept_rest, one);
        double sum = total + *floats(&a->dgain, at(&a->dgain, o, k, 0)) * kept;
        for (int64_t q = Q - 1; q >= 0; q--) {
            sum += excess[q] + (reading[q] - leaving[q] * insert[q]);
            *floats(&a->dlog_decay, at(&a->dlog_decay, o, q, k)) = (float)sum;
            *floats(&a->dinsert, at(&a->dinsert, o, q, k)) = columns[q] / insert[q] + leaving[q];
        }
    }
    (void)scratch;
}

void scan_decay_backward(const decay_args *a) { run_tasks(decay_cell, a, cells(&a->s), 0, a->threads); }
