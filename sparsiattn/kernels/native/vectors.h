/* Vectors of GCC and Clang, as wide as the processor's, and the two matrix products that all code here
   uses. In both, one operand has rows of SPAN numbers; each number of the other operand, read in place,
   is multiplied with a vector. */

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
__declspec(dllimport) int __stdcall SwitchToThread(void);
#define LET_OTHERS_RUN SwitchToThread()
#else
#include <sched.h>
#define EXPORT __attribute__((visibility("default")))
#define LET_OTHERS_RUN sched_yield()
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* WIDE: vectors of 16 on any processor, to test what is compiled for AVX-512 elsewhere */
#if defined(__AVX512F__) || defined(WIDE)
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
#define RELAX __builtin_ia32_pause() /* lets the other hardware thread of the core run */
#else
#define RELAX (void)0
#endif

#define SPAN 64
#define WIDEST 256
#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.4426950408889634f

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
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
    /* unsigned, which may wrap around where x is out of bounds */
    words exponent = ((words)shifted - (words)magic) << 23;
    vec result = (vec)((words)p + exponent);
    vec nan = x - x; /* NaN only if x is not finite; infinity is handled below */
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

/* `rows` keys times `wide` vectors of queries: s[row][query], with a row stride of `apart`. */
INLINE void score(int wide, int rows, const float *q, const float *const *keys, int64_t dim,
                  float *s, int64_t apart) {
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
        for (int j = 0; j < wide; j++) store(s + r * apart + j * WIDTH, sum[r][j]);
}

/* `rows` channels of the result: earlier sums times their factor, plus the values of `count` keys. */
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

/* Rows of one head are far apart in the host's layout, where hardware prefetch does not work. */
INLINE void touch(const float *row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(row + d);
}

/* Waits until another thread has written that number; it is running already, so this is soon. */
static inline void await(const int64_t *at, int64_t value) {
    for (int n = 0; __atomic_load_n(at, __ATOMIC_ACQUIRE) != value; n++)
        if (n > 1000)
            LET_OTHERS_RUN;
        else
            RELAX;
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float total(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#endif
    quad part[WIDTH / 4];
    memcpy(part, &x, sizeof x);
    for (int j = 1; j < WIDTH / 4; j++) part[0] += part[j];
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

INLINE int32_t sum_of(ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t sum = 0;
    for (int j = 0; j < WIDTH; j++) sum += x[j];
    return sum;
#endif
}

INLINE float largest(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int j = 1; j < WIDTH; j++) most = x[j] > most ? x[j] : most;
    return most;
#endif
}

/* Indices of the lanes, starting at `first`. */
INLINE ints lanes_at(int64_t first) {
#if WIDTH == 16
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif WIDTH == 8
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
    const ints lanes = {0, 1, 2, 3};
#endif
    return lanes + (int32_t)first;
}

/* Some lanes of a vector: masks of AVX-512 are registers of their own. */
#if defined(__AVX512F__)
typedef __mmask16 Lanes;
INLINE Lanes lanes_from(vec x, vec least) {
    return _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_GE_OQ);
}
INLINE ints count_lanes(ints count, Lanes lanes) {
    __m512i x = (__m512i)count;
    return (ints)_mm512_mask_add_epi32(x, lanes, x, _mm512_set1_epi32(1));
}
#else
typedef ints Lanes;
INLINE Lanes lanes_from(vec x, vec least) { return x >= least; }
INLINE ints count_lanes(ints count, Lanes lanes) { return count - lanes; }
#endif

#if defined(__AVX2__) && WIDTH == 8
/* Positions of the set bits of a byte, lowest first. */
static uint64_t bit_places[256];
static __attribute__((constructor)) void find_bit_places(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0, n = 0; bit < 8; bit++)
            if (mask >> bit & 1) bit_places[mask] |= (uint64_t)bit << 8 * n++;
}
#endif

/* Writes some lanes in order, and the numbers that belong to them; returns how many. Whole vectors are
   written. */
INLINE int64_t keep_pairs(Lanes lanes, vec x, ints numbers, float *to, int32_t *places) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(lanes, (__m512)x));
    _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(lanes, (__m512i)numbers));
    return __builtin_popcount(lanes);
#elif defined(__AVX2__) && WIDTH == 8
    int mask = _mm256_movemask_ps((__m256)lanes);
    __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bit_places[mask]));
    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps((__m256)x, order));
    _mm256_storeu_si256((__m256i *)places, _mm256_permutevar8x32_epi32((__m256i)numbers, order));
    return __builtin_popcount((unsigned)mask);
#else
    int64_t n = 0;
    for (int j = 0; j < WIDTH; j++) to[n] = x[j], places[n] = numbers[j], n -= lanes[j];
    return n;
#endif
}

/* Counts as numbers; exact below 2^22. */
INLINE vec floats(ints x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23, whose last bits count */
    ints bits = x + (ints)all(magic);
    return (vec)bits - magic;
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
