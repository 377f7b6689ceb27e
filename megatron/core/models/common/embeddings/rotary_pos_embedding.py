"""Cosines and sines of rotary positions; attention applies them."""

import torch
from torch import Tensor, nn

from megatron.core.transformer.rotary import RotaryTables


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin by position, computed once and grown when a sequence is longer.

    Source: Su et al. 2021 (arXiv:2104.09864), with the two halves of a head as the pairs.
    """

    def __init__(self, head_dim: int, *, rotary_percent: float, rotary_base: float) -> None:
        """Remember the frequencies.

        Args:
            head_dim: Size of one head.
            rotary_percent: Share of a head's channels, the first ones, that is rotated.
            rotary_base: The slowest pair turns by about 1 / rotary_base a position.
        """
        super().__init__()
        self.rotary_dim = int(head_dim * rotary_percent) // 2 * 2
        self.rotary_base = rotary_base
        self._tables: dict[tuple[torch.device, torch.dtype], RotaryTables] = {}

    def forward(self, length: int, offset: int, like: Tensor) -> RotaryTables:
        """Return the tables of positions ``offset`` to ``offset + length - 1``.

        Args:
            length: Positions of this forward.
            offset: Positions before it.
            like: Gives device and dtype.
        """
        key, end = (like.device, like.dtype), offset + length
        tables = self._tables.get(key)
        if tables is None or len(tables.cos) < end:
            tables = self._tables[key] = self._compute(end, like)
        return RotaryTables(tables.cos[offset:end], tables.sin[offset:end])

    def _compute(self, length: int, like: Tensor) -> RotaryTables:
        """Compute in fp64 and round once."""
        wide = {"dtype": torch.float64, "device": like.device}
        exponent = torch.arange(0, self.rotary_dim, 2, **wide) / self.rotary_dim  # type: ignore[call-overload]
        turns = torch.arange(length, **wide)  # type: ignore[call-overload]
        angles = torch.outer(turns, self.rotary_base**-exponent)
        return RotaryTables(angles.cos().to(like.dtype), angles.sin().to(like.dtype))
