/* What every kernel shares: tensors as they come from Python, threads, bf16, exponentials. */
#ifndef NATIVE_H
#define NATIVE_H

#include <stdint.h>
#include <string.h>

enum { FP32 = 0, BF16 = 1 };
enum { MAX_DIMS = 6 };

/* Strides count elements; the last dimension has stride 1. data is NULL where Python passed None. */
typedef struct {
    char *data;
    int64_t dtype, stride[MAX_DIMS];
} tensor;

/* Run task(args, i, scratch) for i in 0 .. tasks - 1 on `threads` threads, each with `floats` floats of scratch.
   A task writes nothing that another one touches, so results do not depend on the number of threads. */
typedef void (*task_function)(const void *args, int64_t index, float *scratch);
void run_tasks(task_function task, const void *args, int64_t tasks, int64_t floats, int64_t threads);

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

static inline float *floats(const tensor *t, int64_t offset) { return (float *)t->data + offset; }

/* A row of n numbers in fp32: the row itself, or a copy in `room`. */
static inline const float *load(const tensor *t, int64_t offset, float *restrict room, int64_t n) {
    if (t->dtype == FP32) return (const float *)t->data + offset;
    const uint16_t *restrict from = (const uint16_t *)t->data + offset;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(&room[i], &bits, 4);
    }
    return room;
}

/* Where to write a row in fp32: the tensor's own memory, or `room`, which `store` then rounds into the tensor. */
static inline float *place(const tensor *t, int64_t offset, float *room) {
    return t->dtype == FP32 ? (float *)t->data + offset : room;
}

static inline void store(const tensor *t, int64_t offset, const float *restrict row, int64_t n) {
    if (t->dtype == FP32) return;
    uint16_t *restrict to = (uint16_t *)t->data + offset;
    for (int64_t i = 0; i < n; i++) { /* to nearest, ties to even; NaN stays NaN */
        uint32_t bits;
        memcpy(&bits, &row[i], 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

/* Write a whole row, rounded if need be. */
static inline void write_row(const tensor *t, int64_t offset, const float *row, int64_t n) {
    if (t->dtype == FP32) memcpy((float *)t->data + offset, row, (size_t)n * sizeof(float));
    else store(t, offset, row, n);
}

static inline float get(const tensor *t, int64_t offset) {
    float room;
    return *load(t, offset, &room, 1);
}

/* 2^x for -126 <= x <= 126, within 2 units of the last digit; NaN stays NaN. */
static inline float exp2_fast(float x) {
    float whole = __builtin_rintf(x), f = x - whole; /* exact, |f| <= 1/2 */
    float p = 1.5403530e-4f;                         /* Taylor's series of 2^f: the next term is below 2e-8 */
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* 1 / (1 + e^-x). Beyond 2^-126 the value is held: nothing that it multiplies can show more. */
static inline float sigmoid(float x) {
    /* x log2(e) in two parts: one product would lose 7 bits where |x| is large */
    float t = x * -1.44269504f;
    t = t < -125.0f ? -125.0f : t;
    t = t > 125.0f ? 125.0f : t;
    float rest = __builtin_fmaf(x, -1.44269504f, -t) + x * -1.9259630e-8f;
    rest = rest < -1.0f || rest > 1.0f ? 0.0f : rest; /* where t is held */
    float power = exp2_fast(t);
    return 1.0f / (1.0f + (power + power * (rest * 0.69314718f)));
}

#endif
