"""Cosines and sines of rotary positions; attention applies them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.core.transformer.rotary import RotaryTables


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin by position, computed once and grown when a sequence is longer.

    Source: Su et al. 2021 (arXiv:2104.09864), with the two halves of a head as the pairs.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        rotary_percent: float,
        rotary_base: float,
        interleaved: bool = False,
    ) -> None:
        """Remember the frequencies.

        Args:
            head_dim: Size of one head.
            rotary_percent: Share of a head's channels, the first ones, that is rotated.
            rotary_base: The slowest pair turns by about 1 / rotary_base a position.
            interleaved: Pairs are neighbours instead of halves.
        """
        super().__init__()
        self.head_dim = head_dim
        self.num_pairs = int(head_dim * rotary_percent) // 2
        self.rotary_base, self.interleaved = rotary_base, interleaved
        self._tables: dict[tuple[torch.device, torch.dtype], RotaryTables] = {}

    def forward(self, positions: Sequence[range], like: Tensor) -> RotaryTables:
        """Return the tables of ``positions``, in their order.

        Args:
            positions: Of this forward.
            like: Gives device and dtype.
        """
        key, end = (like.device, like.dtype), max(part.stop for part in positions)
        tables = self._tables.get(key)
        if tables is None or len(tables.cos) < end:
            tables = self._tables[key] = self._compute(end, like)
        return tables._replace(cos=_rows(tables.cos, positions), sin=_rows(tables.sin, positions))

    def _compute(self, length: int, like: Tensor) -> RotaryTables:
        """Compute in fp64 and round once."""
        pairs = torch.arange(self.num_pairs, dtype=torch.float64, device=like.device)
        turns = torch.arange(length, dtype=torch.float64, device=like.device)
        angles = torch.outer(turns, self.rotary_base ** (-pairs / self.num_pairs))
        rest = angles.new_zeros(length, self.head_dim - 2 * self.num_pairs)
        cos = torch.cat([self._both(angles.cos(), angles.cos()), rest + 1.0], dim=1)
        sin = torch.cat([self._both(-angles.sin(), angles.sin()), rest], dim=1)
        return RotaryTables(
            cos.to(like.dtype), sin.to(like.dtype), self.num_pairs, self.interleaved
        )

    def _both(self, first: Tensor, second: Tensor) -> Tensor:
        """Put the values of a pair, [length, pairs] each, where its channels are."""
        if self.interleaved:
            return torch.stack([first, second], dim=-1).flatten(-2)
        return torch.cat([first, second], dim=1)


def _rows(table: Tensor, positions: Sequence[range]) -> Tensor:
    parts = [table[part.start : part.stop] for part in positions]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
