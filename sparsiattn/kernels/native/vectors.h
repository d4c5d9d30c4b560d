/* Vectors of GCC and Clang, as wide as the processor's, and the two products that everything here is
   made of. Both hold rows of SPAN numbers; each number of the other operand, read where it stands,
   meets a whole vector. */

#pragma once

#include <sched.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#define MOST 4 /* vectors of queries at a time: 6 rows of them must fit the registers */
#elif defined(__AVX__)
#define WIDTH 8
#define MOST 2
#elif defined(__aarch64__)
#define WIDTH 4
#define MOST 4
#else
#define WIDTH 4
#define MOST 2
#endif

#if defined(__x86_64__)
#define RELAX __builtin_ia32_pause() /* leaves the core to the other thread on it */
#else
#define RELAX (void)0
#endif

#define SPAN 64
#define WIDEST 256
#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.4426950408889634f

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef float quad __attribute__((vector_size(16)));
typedef int32_t quads __attribute__((vector_size(16)));
typedef void (*Region)(void *);
typedef void (*Parallel)(Region, void *, unsigned, unsigned);

INLINE vec load(const float *at) {
    vec x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE void store(float *at, vec x) { memcpy(at, &x, sizeof x); }

INLINE void clear(float *to, int64_t count) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, (vec){0});
    for (; i < count; i++) to[i] = 0;
}

INLINE vec all(float x) { return x - (vec){0}; }

INLINE vec pick(ints where, vec yes, vec no) {
    return (vec)(((ints)yes & where) | ((ints)no & ~where));
}

INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* 2 to the x for x < 100, to 2e-7; zero below 2^-126. NaN stays NaN. */
INLINE vec power(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec shifted = x + magic;
    vec f = x - (shifted - magic);
    vec p = all(1.5403530393381609e-4f) * f + 1.3333558146428443e-3f;
    p = p * f + 9.6181291076284772e-3f;
    p = p * f + 5.5504108664821580e-2f;
    p = p * f + 2.4022650695910072e-1f;
    p = p * f + 6.9314718055994531e-1f;
    p = p * f + 1.0f;
    ints exponent = ((ints)shifted - (ints)magic) << 23;
    vec result = (vec)((ints)p + exponent);
    vec nan = x - x; /* NaN only where x is not finite; infinity is caught below */
    result = pick(nan == nan, result, x);
    return pick(x < all(-126.0f), (vec){0}, result);
}

/* Four rows of four numbers, to columns. */
INLINE void turn(const float *r0, const float *r1, const float *r2, const float *r3, float *to,
                 int64_t step) {
    quad a, b, c, d;
    memcpy(&a, r0, 16), memcpy(&b, r1, 16), memcpy(&c, r2, 16), memcpy(&d, r3, 16);
#if defined(__clang__)
#define MIX(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define MIX(x, y, i, j, k, l) __builtin_shuffle(x, y, (quads){i, j, k, l})
#endif
    quad ab = MIX(a, b, 0, 4, 1, 5), ba = MIX(a, b, 2, 6, 3, 7);
    quad cd = MIX(c, d, 0, 4, 1, 5), dc = MIX(c, d, 2, 6, 3, 7);
    a = MIX(ab, cd, 0, 1, 4, 5), b = MIX(ab, cd, 2, 3, 6, 7);
    c = MIX(ba, dc, 0, 1, 4, 5), d = MIX(ba, dc, 2, 3, 6, 7);
    memcpy(to, &a, 16), memcpy(to + step, &b, 16);
    memcpy(to + 2 * step, &c, 16), memcpy(to + 3 * step, &d, 16);
}

/* `rows` keys against `wide` vectors of queries: s[row][query]. */
INLINE void score(int wide, int rows, const float *q, const float *const *keys, int64_t dim,
                  float *s) {
    vec sum[6][MOST];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) sum[r][j] = (vec){0};
    for (int64_t d = 0; d < dim; d++) {
        vec x[MOST];
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) x[j] = load(q + d * SPAN + j * WIDTH);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vec key = all(keys[r][d]);
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++) sum[r][j] += x[j] * key;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) store(s + r * SPAN + j * WIDTH, sum[r][j]);
}

/* `rows` channels of the result: what was there, faded, and the values of `count` keys. */
INLINE void blend(int wide, int rows, const float *s, const float *const *values, int64_t at,
                  int64_t count, const float *fade, float *o) {
    vec sum[6][MOST];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++)
            sum[r][j] = load(o + r * SPAN + j * WIDTH) * load(fade + j * WIDTH);
    for (int64_t i = 0; i < count; i++) {
        const float *value = values[i] + at;
        vec x[MOST];
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) x[j] = load(s + i * SPAN + j * WIDTH);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vec y = all(value[r]);
#pragma GCC unroll 4
            for (int j = 0; j < wide; j++) sum[r][j] += x[j] * y;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) store(o + r * SPAN + j * WIDTH, sum[r][j]);
}

/* Rows of one head lie far apart in the host's layout, where the processor does not look ahead. */
INLINE void touch(const float *row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(row + d);
}

/* Until another thread has written that number; it runs already, so this is soon. */
static inline void await(const int64_t *at, int64_t value) {
    for (int n = 0; __atomic_load_n(at, __ATOMIC_ACQUIRE) != value; n++)
        if (n > 1000)
            sched_yield();
        else
            RELAX;
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float total(vec x) {
    quad part[WIDTH / 4];
    memcpy(part, &x, sizeof x);
    for (int j = 1; j < WIDTH / 4; j++) part[0] += part[j];
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

INLINE float dot(const float *a, const float *b, int64_t dim) {
    vec even = {0}, odd = {0};
    int64_t d = 0;
    for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH) {
        even += load(a + d) * load(b + d);
        odd += load(a + d + WIDTH) * load(b + d + WIDTH);
    }
    if (d + WIDTH <= dim) even += load(a + d) * load(b + d), d += WIDTH;
    float result = total(even + odd);
    for (; d < dim; d++) result += a[d] * b[d];
    return result;
}

#define FOR_WIDTH(wide, call)                                                                      \
    switch (wide) {                                                                                \
    case 1: call(1); break;                                                                        \
    case 2: call(2); break;                                                                        \
    case 3: call(MOST > 2 ? 3 : 1); break;                                                         \
    default: call(MOST > 2 ? 4 : 1);                                                               \
    }
