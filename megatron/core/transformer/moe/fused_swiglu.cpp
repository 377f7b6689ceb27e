/* The functions of swiglu.h for callers of this library; see fused_swiglu.py. */

#include "swiglu.h"

extern "C" void activate(const number *inner, int64_t inner_stride, const float *probs, number *out,
                         int64_t out_stride, int64_t num_rows, int64_t width)
{
    activate_rows(inner, inner_stride, probs, out, out_stride, num_rows, width);
}

extern "C" void differentiate(const number *inner, int64_t inner_stride, const float *probs,
                              const number *grad, int64_t grad_stride, number *grad_inner,
                              int64_t grad_inner_stride, float *grad_probs, number *activated,
                              int64_t activated_stride, int64_t num_rows, int64_t width)
{
    differentiate_rows(inner, inner_stride, probs, grad, grad_stride, grad_inner,
                       grad_inner_stride, grad_probs, activated, activated_stride, num_rows,
                       width);
}
