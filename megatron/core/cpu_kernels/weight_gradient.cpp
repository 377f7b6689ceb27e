/* A weight gradient of bfloat16 operands, added to float sums; see weight_gradient.py. */

#include "products.h"

extern "C" int is_available(void) { return can_multiply(); }

extern "C" void add_weight_gradient(const number *grad, int64_t grad_stride, const number *input,
                                    int64_t input_stride, float *sum, int64_t sum_stride,
                                    int64_t num_rows, int64_t out, int64_t in)
{
    add_product(num_rows, out, in, grad, grad_stride, input, input_stride, sum, sum_stride);
    done_multiplying();
}
