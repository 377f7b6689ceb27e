"""ColumnParallelLinear: the first matrix of a pair, its output features split over ranks."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers.linear import Linear
from megatron.core.tensor_parallel.region_entry import RegionEntry
from megatron.core.tensor_parallel.weight_split import split_over


class ColumnParallelLinear(Linear):
    """Linear layer that reads the whole residual stream: linear_qkv and linear_fc1.

    Each rank of ``tp`` computes its slice of the output features, and of the bias where that is
    handed back.

    Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        pg_collection: ProcessGroupCollection,
        parts: tuple[int, ...] | None = None,
        part_names: tuple[str, ...] = (),
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
            part_names: Of ``parts``, where each is a tensor of its own in a checkpoint.
            sequence_parallel: The input is this rank's share of the sequence, [s / tp, ...].
            options: See ``Linear``.
        """
        parts = (output_size,) if parts is None else parts
        split = split_over("tp", pg_collection, dim=0, parts=parts, names=part_names)
        entry = RegionEntry(pg_collection.tp, sequence_parallel)
        super().__init__(input_size, output_size, split=split, entry=entry, **options)
