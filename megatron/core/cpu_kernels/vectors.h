/* Vectors of as many numbers as a register holds, computed with in float whatever is stored.

   With BF16 numbers are bfloat16, else float. Plain extensions of GCC and clang, so that it
   compiles for any processor. */

#pragma once

#include <stdint.h>
#include <string.h>

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

WITHIN wide load(const number *from, int count)
{
    numbers x = {};
    if (count == LANES)
        memcpy(&x, from, sizeof x);
    else
        memcpy(&x, from, count * sizeof *from);
    return widen(x);
}

#ifdef BF16
WITHIN wide load(const float *from, int count)
{
    wide x = {};
    memcpy(&x, from, count == LANES ? sizeof x : count * sizeof *from);
    return x;
}
#endif

WITHIN void store(number *to, wide x, int count)
{
    numbers rounded = narrow(x);
    if (count == LANES)
        memcpy(to, &rounded, sizeof rounded);
    else
        memcpy(to, &rounded, count * sizeof *to);
}

WITHIN wide choose(mask where, wide yes, wide no)
{
    return (wide)(((bits)where & (bits)yes) | (~(bits)where & (bits)no));
}

/* exp(x) for -87 <= x <= 0: 2^n times the Taylor polynomial of the rest, at most ln(2) / 2. */
WITHIN wide exp_of_negative(wide x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    wide shifted = x * 1.44269504f + shift;
    wide n = shifted - shift;
    wide r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln(2) in two parts */
    wide p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    return (wide)((bits)p + ((bits)shifted << 23)); /* the integer, added to the exponent */
}
