"""Weighted means over the microbatches and ranks of one step, of what a layer measures in each.

A value is assigned to its slot [layer, microbatch], so a recomputed forward counts once.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.tensor_parallel.mappings import all_reduce_sum


class SlotMeans:
    """The slots of one step, on the device, in fp64: the order of ranks does not show in fp32."""

    def __init__(
        self, num_layers: int, num_microbatches: int, width: int, device: torch.device
    ) -> None:
        """Make empty slots of ``width`` values and a weight each."""
        self._sums = torch.zeros(
            num_layers, num_microbatches, width + 1, dtype=torch.float64, device=device
        )

    def assign(self, row: int, microbatch: int, values: Tensor, weight: int | Tensor) -> None:
        """Fill one slot.

        Args:
            row: Of the layer.
            microbatch: Within the step.
            values: [width], or fewer.
            weight: What they count for, such as the number of tokens; 0 leaves them out.
        """
        slot = self._sums[row, microbatch]
        slot[: len(values)] = values.double() * weight
        slot[-1] = weight

    def means(self, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        """Return [layers, width] means and [layers] weights; every rank of ``group`` calls this.

        The mean of nothing is 0.
        """
        total = all_reduce_sum(group, self._sums.sum(dim=1))
        weights = total[:, -1]
        return total[:, :-1] / weights.clamp(min=1e-300).unsqueeze(1), weights

    def clear(self) -> None:
        """Begin the next step."""
        self._sums.zero_()
