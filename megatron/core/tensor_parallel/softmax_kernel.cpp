/* The exponentials of rows of logits, in place, and their sums: once through memory.

   Compiled once for each format of logits (see softmax_kernel.py): with BF16 they are bfloat16, else
   float. In between all is float. Threads share the rows; a row's result depends on no other row. */

#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "registers.h"

namespace {

#ifdef BF16
const uint16_t LEAST = 0xff80; /* -inf */
#else
const float LEAST = -INFINITY;
#endif

const int64_t LEAST_ROWS = 4; /* that are worth a thread */

WITHIN wide load(const number *from)
{
    numbers x;
    memcpy(&x, from, sizeof x);
    return widen(x);
}

/* The first ``count`` numbers; -inf fills the register. */
WITHIN wide load_some(const number *from, int64_t count)
{
    number x[LANES];
    for (int i = 0; i < LANES; i++)
        x[i] = LEAST;
    memcpy(x, from, count * sizeof *from);
    return load(x);
}

WITHIN void store(number *to, wide x, int64_t count)
{
    numbers rounded = narrow(x);
    memcpy(to, &rounded, count * sizeof *to);
}

WITHIN wide choose(mask where, wide yes, wide no)
{
    return (wide)(((bits)where & (bits)yes) | (~(bits)where & (bits)no));
}

/* exp(x) for x <= 0: 2^n times the Taylor polynomial of the rest, at most ln(2) / 2; 0 below the
   least normal number. A NaN stays one. */
WITHIN wide exp_of_negative(wide x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    mask tiny = x < -87.3f;
    wide shifted = x * 1.44269504f + shift;
    wide n = shifted - shift;
    wide r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln(2) in two parts */
    wide p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    wide y = (wide)((bits)p + ((bits)shifted << 23)); /* the integer, added to the exponent */
    return choose(tiny, wide{}, choose(x != x, x, y));
}

WITHIN wide larger(wide a, wide b) { return choose(a > b, a, b); }

float row_max(const number *x, int64_t width)
{
    wide most[4];
    for (wide &m : most)
        m = wide{} - INFINITY;
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int k = 0; k < 4; k++)
            most[k] = larger(load(x + i + k * LANES), most[k]);
    for (; i < width; i += LANES)
        most[0] = larger(load_some(x + i, width - i < LANES ? width - i : LANES), most[0]);
    wide all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    float top = all[0];
    for (int k = 1; k < LANES; k++)
        top = all[k] > top ? all[k] : top;
    return top;
}

float exp_row(number *x, float factor, float top, int64_t width)
{
    wide sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            number *at = x + i + k * LANES;
            wide y = exp_of_negative(load(at) * factor - top);
            sums[k] += y;
            store(at, y, LANES);
        }
    for (; i < width; i += LANES) {
        int64_t count = width - i < LANES ? width - i : LANES;
        wide y = exp_of_negative(load_some(x + i, count) * factor - top);
        sums[0] += y;
        store(x + i, y, count);
    }
    wide all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0.0f;
    for (int k = 0; k < LANES; k++)
        total += all[k];
    return total;
}

} // namespace

extern "C" {

/* tops[row] = factor * the largest of the first ``width`` numbers of a row; factor is above 0. */
void max_of_rows(const number *x, int64_t stride, float factor, float *tops, int64_t rows,
                 int64_t width)
{
    in_parallel(rows, LEAST_ROWS, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            tops[row] = factor * row_max(x + row * stride, width);
    });
}

/* x = exp(factor * x - top), zero from ``width`` on; totals[row] is the sum before x is rounded. The
   tops are those of the rows, and are written, unless ``is_given``. */
void exp_of_rows(number *x, int64_t stride, float factor, float *tops, int is_given, float *totals,
                 int64_t rows, int64_t width)
{
    in_parallel(rows, LEAST_ROWS, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            number *here = x + row * stride;
            if (!is_given)
                tops[row] = factor * row_max(here, width);
            totals[row] = exp_row(here, factor, tops[row], width);
            memset(here + width, 0, (stride - width) * sizeof *here);
        }
    });
}
}
