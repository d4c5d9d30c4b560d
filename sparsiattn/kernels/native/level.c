/* Detects the level of x86-64 (as in its psABI) that processor and operating system support: 1 to 4.

   Compiled for every x86-64 processor, and loaded before any other library. */

#include <cpuid.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define SOME(word, bits) (((word) & (bits)) == (bits))
#define BIT(n) (1u << (n))

/* The register states that the operating system saves; it must save them to make them usable. */
static uint32_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

EXPORT int32_t sparsiattn_level(void) {
    uint32_t a, b, c, d, ext, more = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 1;
    uint32_t base = c, saved = base & BIT(27) ? saved_registers() : 0;
    if (!__get_cpuid(0x80000001u, &a, &b, &ext, &d)) return 1;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) more = b;
    /* SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; LAHF */
    if (!SOME(base, BIT(0) | BIT(9) | BIT(13) | BIT(19) | BIT(20) | BIT(23)) || !(ext & BIT(0)))
        return 1;
    /* FMA, MOVBE, AVX, F16C; LZCNT; BMI1, AVX2, BMI2; XMM and YMM */
    if (!SOME(base, BIT(12) | BIT(22) | BIT(28) | BIT(29)) || !(ext & BIT(5)) ||
        !SOME(more, BIT(3) | BIT(5) | BIT(8)) || !SOME(saved, 6u))
        return 2;
    /* AVX-512 F, DQ, CD, BW, VL; masks and ZMM, too */
    if (!SOME(more, BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31)) || !SOME(saved, 0xe6u)) return 3;
    return 4;
}
