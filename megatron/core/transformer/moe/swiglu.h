/* SwiGLU times the weight of a row, and its gradient: all of it in one pass over memory.

   In between all is float. Rows lie one behind the other, strides are in numbers. A row's result
   depends on no other row, nor on where it lies. */

#pragma once

#include "vectors.h"

/* By the exponential of a negative number, so that nothing overflows. */
WITHIN wide sigmoid(wide x)
{
    wide negative = (wide)((bits)x | 0x80000000u);
    wide lowest = wide{} - 87.0f;
    wide e = exp_of_negative(choose(negative < lowest, lowest, negative));
    return choose(x < 0.0f, e, wide{} + 1.0f) / (1.0f + e);
}

static void activate_rows(const number *inner, int64_t inner_stride, const float *probs,
                          number *out, int64_t out_stride, int64_t num_rows, int64_t width)
{
    for (int64_t row = 0; row < num_rows; row++) {
        const number *gate = inner + row * inner_stride, *up = gate + width;
        number *to = out + row * out_stride;
        for (int64_t i = 0; i < width; i += LANES) {
            int count = width - i < LANES ? (int)(width - i) : LANES;
            wide g = load(gate + i, count);
            store(to + i, g * sigmoid(g) * load(up + i, count) * probs[row], count);
        }
    }
}

template <class Grad> /* number, or float */
static void differentiate_rows(const number *inner, int64_t inner_stride, const float *probs,
                               const Grad *grad, int64_t grad_stride, number *grad_inner,
                               int64_t grad_inner_stride, float *grad_probs, number *activated,
                               int64_t activated_stride, int64_t num_rows, int64_t width)
{
    for (int64_t row = 0; row < num_rows; row++) {
        const number *gate = inner + row * inner_stride, *up = gate + width;
        const Grad *from = grad + row * grad_stride;
        number *grad_gate = grad_inner + row * grad_inner_stride, *grad_up = grad_gate + width;
        number *active = activated + row * activated_stride;
        wide products = {};
        for (int64_t i = 0; i < width; i += LANES) {
            int count = width - i < LANES ? (int)(width - i) : LANES;
            wide g = load(gate + i, count), u = load(up + i, count), d = load(from + i, count);
            wide s = sigmoid(g), silu = g * s, weighted = d * probs[row];
            products += silu * u * d;
            store(active + i, silu * u * probs[row], count);
            store(grad_up + i, weighted * silu, count);
            store(grad_gate + i, weighted * u * (s + silu * (1.0f - s)), count);
        }
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++)
            sum += products[lane];
        grad_probs[row] = sum;
    }
}
