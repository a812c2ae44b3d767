/* RMSNorm, plain (no z) and gated. A task is a few tokens; rows stay in the cache between their passes. */
#include <math.h>

#include "native.h"

enum { TOKENS = 16 };

typedef struct {
    int64_t threads, tokens, channels, groups, norm_before_gate;
    double eps;
    tensor x, z, weight, inverse;   /* tokens C, tokens C or NULL, C, tokens groups fp32 */
    tensor y;                       /* tokens C */
    tensor dy, dx, dz, partial;     /* tokens C (dz NULL where z is), (tasks) C fp32 */
} norm_args;

static void silu(float *restrict out, const float *restrict z, int64_t n) {
    for (int64_t c = 0; c < n; c++) out[c] = z[c] * sigmoid(z[c]);
}

static void times(float *restrict out, const float *restrict a, const float *restrict b, int64_t n) {
    for (int64_t c = 0; c < n; c++) out[c] = a[c] * b[c];
}

static float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < n; c++) sum += a[c] * b[c];
    return sum;
}

static void forward_tokens(const void *arguments, int64_t index, float *scratch) {
    const norm_args *a = arguments;
    int64_t n = a->channels, size = n / a->groups;
    float *weight_room = scratch, *x_room = scratch + n, *z_room = scratch + 2 * n, *gate = scratch + 3 * n;
    float *gated = scratch + 4 * n, *y_room = scratch + 5 * n;
    const float *weight = load(&a->weight, 0, weight_room, n);
    for (int64_t t = index * TOKENS; t < smaller((index + 1) * TOKENS, a->tokens); t++) {
        const float *u = load(&a->x, t * a->x.stride[0], x_room, n);
        float *inverse = floats(&a->inverse, t * a->groups);
        float *y = place(&a->y, t * a->y.stride[0], y_room);
        if (a->z.data) {
            silu(gate, load(&a->z, t * a->z.stride[0], z_room, n), n);
            if (!a->norm_before_gate) {
                times(gated, u, gate, n);
                u = gated;
            }
        }
        for (int64_t g = 0; g < a->groups; g++) {
            const float *restrict ug = u + g * size, *restrict wg = weight + g * size;
            float *restrict yg = y + g * size;
            float scale = 1.0f / sqrtf(dot(ug, ug, size) / (float)size + (float)a->eps);
            inverse[g] = scale;
            for (int64_t c = 0; c < size; c++) yg[c] = ug[c] * scale * wg[c];
        }
        if (a->z.data && a->norm_before_gate)
            for (int64_t c = 0; c < n; c++) y[c] *= gate[c];
        store(&a->y, t * a->y.stride[0], y, n);
    }
}

void norm_forward(const norm_args *a) {
    run_tasks(forward_tokens, a, blocks_of(a->tokens, TOKENS), 6 * a->channels, a->threads);
}

/* Gradient of u through N(u) weight, from its gradient d: both of one group. Adds to dweight. */
static void through_norm(float *restrict du, float *restrict dweight, const float *restrict d, const float *restrict u,
                         const float *restrict weight, float scale, int64_t n) {
    float along = 0.0f;
#pragma omp simd reduction(+ : along)
    for (int64_t c = 0; c < n; c++) {
        float product = d[c] * (u[c] * scale);
        dweight[c] += product;
        along += product * weight[c];
    }
    along /= (float)n;
    for (int64_t c = 0; c < n; c++) du[c] = (d[c] * weight[c] - u[c] * scale * along) * scale;
}

static void backward_tokens(const void *arguments, int64_t index, float *scratch) {
    const norm_args *a = arguments;
    int64_t n = a->channels, size = n / a->groups;
    float *room[10];
    for (int64_t i = 0; i < 10; i++) room[i] = scratch + i * n;
    const float *weight = load(&a->weight, 0, room[0], n);
    float *dweight = floats(&a->partial, index * n);
    memset(dweight, 0, (size_t)n * sizeof(float));
    for (int64_t t = index * TOKENS; t < smaller((index + 1) * TOKENS, a->tokens); t++) {
        const float *x = load(&a->x, t * a->x.stride[0], room[1], n), *u = x;
        const float *dy = load(&a->dy, t * a->dy.stride[0], room[2], n), *d = dy;
        const float *inverse = floats(&a->inverse, t * a->groups);
        const float *z = NULL;
        float *gate = room[4], *du = place(&a->dx, t * a->dx.stride[0], room[5]);
        if (a->z.data) {
            z = load(&a->z, t * a->z.stride[0], room[3], n);
            silu(gate, z, n);
            if (a->norm_before_gate) {
                times(room[6], dy, gate, n);
                d = room[6];
            } else {
                times(room[6], x, gate, n);
                u = room[6];
            }
        }
        for (int64_t g = 0; g < a->groups; g++) {
            int64_t at = g * size;
            through_norm(du + at, dweight + at, d + at, u + at, weight + at, inverse[g], size);
        }
        if (z) {
            float *restrict dz = place(&a->dz, t * a->dz.stride[0], room[7]), *restrict dgate = room[8];
            if (a->norm_before_gate) {
                for (int64_t g = 0; g < a->groups; g++)
                    for (int64_t c = g * size; c < (g + 1) * size; c++) dgate[c] = dy[c] * x[c] * inverse[g] * weight[c];
            } else {
                times(dgate, du, x, n);
                for (int64_t c = 0; c < n; c++) du[c] *= gate[c];
            }
            for (int64_t c = 0; c < n; c++) {
                float s = sigmoid(z[c]);
                dz[c] = dgate[c] * s * (1.0f + z[c] * (1.0f - s));
            }
            store(&a->dz, t * a->dz.stride[0], dz, n);
        }
        store(&a->dx, t * a->dx.stride[0], du, n);
    }
}

void norm_backward(const norm_args *a) {
    run_tasks(backward_tokens, a, blocks_of(a->tokens, TOKENS), 10 * a->channels, a->threads);
}
