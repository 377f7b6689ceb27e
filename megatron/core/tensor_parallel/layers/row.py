"""RowParallelLinear: the second matrix of a pair, whose input would be split over ranks."""

from megatron.core.tensor_parallel.layers.linear import Linear


class RowParallelLinear(Linear):
    """Linear layer that writes to the residual stream: linear_proj and linear_fc2.

    Tensor parallelism will split its input features; with the only size offered so far, 1, it
    holds all of them.
    """
