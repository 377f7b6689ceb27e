/* LayerNorm and RMSNorm of rows, and their gradients, each in one pass over memory.

   Compiled once for each format of rows (see norm_kernel.py): with BF16 they are bfloat16, else
   float. Statistics, scale, shift and their gradients are float, and so is all in between. A row's
   result depends on no other row. Gradients of scale and shift are summed in the order of rows, in
   groups of 64 that threads share: neither rounding grows with the number of rows nor do bits depend
   on that of threads. */

#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "registers.h"

namespace {

const int64_t GROUP = 64; /* rows whose gradients of scale and shift are summed together */

/* ``count`` numbers, LANES or fewer; zeros fill the register. */
WITHIN wide load(const number *from, int64_t count)
{
    numbers x = {};
    if (count >= LANES)
        memcpy(&x, from, sizeof x);
    else
        memcpy(&x, from, count * sizeof *from);
    return widen(x);
}

WITHIN void store(number *to, wide x, int64_t count)
{
    numbers rounded = narrow(x);
    if (count >= LANES)
        memcpy(to, &rounded, sizeof rounded);
    else
        memcpy(to, &rounded, count * sizeof *to);
}

WITHIN wide load_float(const float *from, int64_t count)
{
    wide x = {};
    if (count >= LANES)
        memcpy(&x, from, sizeof x);
    else
        memcpy(&x, from, count * sizeof *from);
    return x;
}

WITHIN void store_float(float *to, wide x, int64_t count)
{
    if (count >= LANES)
        memcpy(to, &x, sizeof x);
    else
        memcpy(to, &x, count * sizeof *to);
}

/* Set the lanes from ``count`` on to zero. */
WITHIN wide first_lanes(wide x, int64_t count)
{
    wide kept = {};
    memcpy(&kept, &x, count * sizeof(float));
    return kept;
}

WITHIN float total(wide x)
{
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++)
        sum += x[i];
    return sum;
}

/* The sums over a row of one or two terms: ``term(place, count, a, b)`` adds to a and b. */
template <typename Term> WITHIN void sum_row(int64_t width, Term term, float &one, float &other)
{
    wide a[2] = {}, b[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        term(i, LANES, a[0], b[0]);
        term(i + LANES, LANES, a[1], b[1]);
    }
    if (i + LANES <= width)
        term(i, LANES, a[0], b[0]), i += LANES;
    if (i < width)
        term(i, width - i, a[0], b[0]);
    one = total(a[0] + a[1]), other = total(b[0] + b[1]);
}

/* Call ``act(place, count)`` for a row, a register at a time, and for what is left of it. */
template <typename Act> WITHIN void along_row(int64_t width, Act act)
{
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        act(i, LANES);
    if (i < width)
        act(i, width - i);
}

template <bool centred>
WITHIN void normalize(const number *x, const float *scale, const float *shift, float eps,
                      number *out, float *mean, float *rstd, int64_t width)
{
    float middle = 0.0f, unused, squares;
    if (centred) {
        sum_row(width, [=](int64_t i, int64_t n, wide &a, wide &) { a += load(x + i, n); },
                middle, unused);
        middle /= width;
        *mean = middle;
    }
    sum_row(
        width,
        [=](int64_t i, int64_t n, wide &a, wide &) {
            wide off = load(x + i, n) - middle;
            if (centred && n < LANES)
                off = first_lanes(off, n);
            a += off * off;
        },
        squares, unused);
    float factor = 1.0f / std::sqrt(squares / width + eps);
    *rstd = factor;
    along_row(width, [=](int64_t i, int64_t n) {
        wide y = (load(x + i, n) - middle) * factor * load_float(scale + i, n);
        if (centred)
            y += load_float(shift + i, n);
        store(out + i, y, n);
    });
}

/* With g = grad * scale and n the normalised row: d_x = rstd * (g - mean(g) - n * mean(g * n)),
   without the first mean where a row is not centred. */
template <bool centred>
WITHIN void differentiate(const number *grad, const number *x, const float *scale, float mean,
                          float rstd, number *d_x, float *d_scale, float *d_shift, int64_t width)
{
    float along = 0.0f, level = 0.0f;
    sum_row(
        width,
        [=](int64_t i, int64_t n, wide &a, wide &b) {
            wide g = load(grad + i, n) * load_float(scale + i, n);
            a += g * (load(x + i, n) - mean);
            if (centred)
                b += g;
        },
        along, level);
    along *= rstd * rstd / width, level /= width;
    along_row(width, [=](int64_t i, int64_t n) {
        wide dy = load(grad + i, n), off = load(x + i, n) - mean;
        store_float(d_scale + i, load_float(d_scale + i, n) + dy * (off * rstd), n);
        wide g = dy * load_float(scale + i, n) - off * along;
        if (centred) {
            store_float(d_shift + i, load_float(d_shift + i, n) + dy, n);
            g -= level;
        }
        store(d_x + i, g * rstd, n);
    });
}

void add_group(float *sums, const float *group, int64_t width)
{
    for (int64_t i = 0; i < width; i++)
        sums[i] += group[i];
}

/* ``groups``: room for 2 x width numbers of every group of rows. */
template <bool centred>
void differentiate_rows(const number *grad, const number *x, const float *scale, const float *mean,
                        const float *rstd, number *d_x, float *d_scale, float *d_shift,
                        float *groups, int64_t rows, int64_t width)
{
    const int64_t count = (rows + GROUP - 1) / GROUP;
    in_parallel(count, 1, [=](int64_t begin, int64_t end) {
        for (int64_t one = begin; one < end; one++) {
            float *sums = groups + one * 2 * width;
            memset(sums, 0, 2 * width * sizeof *sums);
            int64_t last = (one + 1) * GROUP < rows ? (one + 1) * GROUP : rows;
            for (int64_t row = one * GROUP; row < last; row++)
                differentiate<centred>(grad + row * width, x + row * width, scale,
                                       centred ? mean[row] : 0.0f, rstd[row], d_x + row * width,
                                       sums, sums + width, width);
        }
    });
    for (int64_t one = 0; one < count; one++) {
        add_group(d_scale, groups + one * 2 * width, width);
        if (centred)
            add_group(d_shift, groups + (one * 2 + 1) * width, width);
    }
}

} // namespace

extern "C" {

/* Rows lie one behind the other. RMSNorm where ``mean`` is null; ``shift`` is then not read. */
void norm_forward(const number *x, const float *scale, const float *shift, float eps, number *out,
                  float *mean, float *rstd, int64_t rows, int64_t width)
{
    in_parallel(rows, GROUP, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const number *from = x + row * width;
            number *to = out + row * width;
            if (mean)
                normalize<true>(from, scale, shift, eps, to, mean + row, rstd + row, width);
            else
                normalize<false>(from, scale, shift, eps, to, mean, rstd + row, width);
        }
    });
}

/* ``d_scale`` and ``d_shift`` come filled with zeros; ``groups``: see differentiate_rows. */
void norm_backward(const number *grad, const number *x, const float *scale, const float *mean,
                   const float *rstd, number *d_x, float *d_scale, float *d_shift, float *groups,
                   int64_t rows, int64_t width)
{
    if (mean)
        differentiate_rows<true>(grad, x, scale, mean, rstd, d_x, d_scale, d_shift, groups, rows,
                                 width);
    else
        differentiate_rows<false>(grad, x, scale, mean, rstd, d_x, d_scale, d_shift, groups, rows,
                                  width);
}
}
