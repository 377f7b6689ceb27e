"""RowParallelLinear: the second matrix of a pair, its input features split over ranks."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron.core.param_role import role_of, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers.linear import Linear
from megatron.core.tensor_parallel.linear_product import linear
from megatron.core.tensor_parallel.regions import leave_region
from megatron.core.tensor_parallel.weight_split import split_over


class RowParallelLinear(Linear):
    """Linear layer that writes to the residual stream: linear_proj and linear_fc2.

    Each rank of ``tp`` reads its slice of the input features; the products are summed. The bias is
    held by all of them, and added to the sum.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        pg_collection: ProcessGroupCollection,
        sequence_parallel: bool = False,
        **options: Any,
    ) -> None:
        """Make this rank's slices.

        Args:
            input_size: See ``Linear``.
            output_size: See ``Linear``.
            pg_collection: Its ``tp`` splits the input.
            sequence_parallel: The output is this rank's share of the sequence, [s / tp, ...].
            options: See ``Linear``.
        """
        split = split_over("tp", pg_collection, dim=1, parts=(input_size,))
        super().__init__(input_size, output_size, split=split, **options)
        self.tp_group, self.sequence_parallel = pg_collection.tp, sequence_parallel
        if self.bias is not None and sequence_parallel:
            set_role(self.bias, replace(role_of(self.bias), sums_over_tp=True))

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply this rank's features of the input [..., input_size / tp]; see ``Linear``."""
        if self.tp_group.size() == 1:
            return super().forward(input_)  # the bias added within the product
        part = linear(input_, self.weight)
        output = leave_region(self.tp_group, part, sequence_parallel=self.sequence_parallel)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None
