"""ColumnParallelLinear: the first matrix of a pair, its output features split over ranks."""

from typing import Any

from torch import Tensor

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers.linear import Linear
from megatron.core.tensor_parallel.regions import enter_region
from megatron.core.tensor_parallel.weight_split import split_over


class ColumnParallelLinear(Linear):
    """Linear layer that reads the whole residual stream: linear_qkv and linear_fc1.

    Each rank of ``tp`` computes its slice of the output features.

    Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        pg_collection: ProcessGroupCollection,
        parts: tuple[int, ...] | None = None,
        sequence_parallel: bool = False,
        **options: Any,
    ) -> None:
        """Make this rank's slices.

        Args:
            input_size: See ``Linear``.
            output_size: See ``Linear``.
            pg_collection: Its ``tp`` splits the output.
            parts: Output features that are split each on their own, such as gate and up; all of
                them as one when None.
            sequence_parallel: The input is this rank's share of the sequence, [s / tp, ...].
            options: See ``Linear``.
        """
        parts = (output_size,) if parts is None else parts
        split = split_over("tp", pg_collection, dim=0, parts=parts)
        super().__init__(input_size, output_size, split=split, **options)
        self.tp_group, self.sequence_parallel = pg_collection.tp, sequence_parallel

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``Linear.forward``; the output has this rank's features, as the bias does."""
        whole = enter_region(self.tp_group, input_, sequence_parallel=self.sequence_parallel)
        return super().forward(whole)
