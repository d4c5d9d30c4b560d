/* Conversions between the dtypes of hosts and float32; all arithmetic is in float32. */

#pragma once

#include "vectors.h"

/* The order of `KINDS` in ops.py. */
enum { F32, BF16, F16, BOOL };

typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
typedef uint16_t shorts __attribute__((vector_size(2 * WIDTH)));

INLINE int64_t bytes_of(int64_t kind) { return kind == F32 ? 4 : kind == BOOL ? 1 : 2; }

/* An element of an array. */
INLINE const void *element(const void *x, int64_t kind, int64_t at) {
    return (const char *)x + at * bytes_of(kind);
}

INLINE ints pick_words(ints where, ints yes, ints no) { return (yes & where) | (no & ~where); }

/* A boolean mask as an additive one: zero where a key is visible. */
INLINE vec from_bools(const void *x) {
    bytes b;
    memcpy(&b, x, sizeof b);
    return pick(__builtin_convertvector(b, ints) != 0, (vec){0}, all(-__builtin_inff()));
}

INLINE vec from_bf16(const void *x) {
    shorts s;
    memcpy(&s, x, sizeof s);
    return (vec)(__builtin_convertvector(s, words) << 16);
}

INLINE vec from_f16(const void *x) {
    shorts s;
    memcpy(&s, x, sizeof s);
    ints bits = __builtin_convertvector(s, ints), size = (bits & 0x7fff) << 13;
    /* the exponents differ by 112; infinity and NaN keep theirs, the largest */
    vec scaled = (vec)size * all(0x1p112f), beyond = (vec)(size | 0x7f800000);
    vec f = pick((bits & 0x7c00) == 0x7c00, beyond, scaled);
    return (vec)((words)f | (words)(bits & 0x8000) << 16);
}

INLINE shorts to_bf16(vec x) {
    words bits = (words)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ints even = pick_words(x == x, (ints)rounded, (ints){0} + 0x7fc0);
    return __builtin_convertvector(even, shorts);
}

INLINE shorts to_f16(vec x) {
    words bits = (words)x, size = bits & 0x7fffffff;
    words normal = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
    /* below 2^-14 the sum with one half has the right last bit */
    vec small = (vec)size + all(0.5f);
    ints half = pick_words((ints)size < 0x38800000, (ints)small - 0x3f000000, (ints)normal);
    half = pick_words((ints)size >= 0x477ff000, (ints){0} + 0x7c00, half);
    half = pick_words((ints)size > 0x7f800000, (ints){0} + 0x7e00, half);
    return __builtin_convertvector(half | (ints)(bits >> 16 & 0x8000), shorts);
}

INLINE vec from_kind(int64_t kind, const void *x) {
    return kind == F32    ? load(x)
           : kind == BF16 ? from_bf16(x)
           : kind == F16  ? from_f16(x)
                          : from_bools(x);
}

INLINE void widen_as(int64_t kind, const char *from, float *to, int64_t count) {
    int64_t i = 0, size = bytes_of(kind);
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, from_kind(kind, from + i * size));
    if (i == count) return;
    char rest[4 * WIDTH] = {0};
    memcpy(rest, from + i * size, (count - i) * size);
    vec x = from_kind(kind, rest);
    memcpy(to + i, &x, (count - i) * 4);
}

/* A row as float32; masks become logits to add. */
INLINE void widen(int64_t kind, const void *from, float *to, int64_t count) {
    switch (kind) {
    case F32: memcpy(to, from, count * 4); break;
    case BF16: widen_as(BF16, from, to, count); break;
    case F16: widen_as(F16, from, to, count); break;
    default: widen_as(BOOL, from, to, count);
    }
}

/* Writes a row of float32 as another floating-point dtype. */
INLINE void narrow(int64_t kind, const float *from, void *to, int64_t count) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        float rest[WIDTH] = {0};
        memcpy(rest, from + i, smaller(WIDTH, count - i) * 4);
        shorts x = kind == BF16 ? to_bf16(load(rest)) : to_f16(load(rest));
        memcpy((uint16_t *)to + i, &x, smaller(WIDTH, count - i) * 2);
    }
}
