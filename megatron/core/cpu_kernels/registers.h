/* A register of numbers, computed with in float whatever is stored.

   With BF16 numbers are bfloat16, else float. Plain extensions of GCC and clang, so that it
   compiles for any processor. */

#pragma once

#include <stdint.h>

/* As many numbers as a register holds: more are taken apart, which costs five times the time. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define WITHIN static inline __attribute__((always_inline))

typedef float wide __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_bits __attribute__((vector_size(2 * LANES)));

#ifdef BF16
typedef uint16_t number;
typedef half_bits numbers;

WITHIN wide widen(numbers x) { return (wide)(__builtin_convertvector(x, bits) << 16); }

/* To the nearest, ties to even; a NaN stays one. */
WITHIN numbers narrow(wide x)
{
    bits b = (bits)x, nan = (bits)(x != x);
    bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), numbers);
}
#else
typedef float number;
typedef wide numbers;

WITHIN wide widen(numbers x) { return x; }
WITHIN numbers narrow(wide x) { return x; }
#endif
