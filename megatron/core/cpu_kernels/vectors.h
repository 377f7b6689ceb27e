/* Vectors of as many numbers as a register holds: loads, stores, choices and exponentials. */

#pragma once

#include <string.h>

#include "registers.h"

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
