"""ColumnParallelLinear: the first matrix of a pair, whose output would be split over ranks."""

from megatron.core.tensor_parallel.layers.linear import Linear


class ColumnParallelLinear(Linear):
    """Linear layer that reads the whole residual stream: linear_qkv and linear_fc1.

    Tensor parallelism will split its output features; with the only size offered so far, 1, it
    holds all of them.
    """
