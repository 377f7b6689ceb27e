"""RowParallelLinear: the second matrix of a pair, its input features split over ranks."""

from typing import Any

from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers.linear import Linear
from megatron.core.tensor_parallel.regions import reduce_from_region
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
        **options: Any,
    ) -> None:
        """Make this rank's slices.

        Args:
            input_size: See ``Linear``.
            output_size: See ``Linear``.
            pg_collection: Its ``tp`` splits the input.
            options: See ``Linear``.
        """
        split = split_over("tp", pg_collection, dim=1, parts=(input_size,))
        super().__init__(input_size, output_size, split=split, **options)
        self.tp_group = pg_collection.tp

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply this rank's features of the input [..., input_size / tp]; see ``Linear``."""
        if self.tp_group.size() == 1:
            return super().forward(input_)  # the bias added within the product
        output = reduce_from_region(self.tp_group, nn.functional.linear(input_, self.weight))
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None
