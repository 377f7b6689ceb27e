"""Cosines and sines of rotary positions; attention applies them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.core.transformer.config.rotary import RotaryConfig
from megatron.core.transformer.rotary import RotaryTables
from megatron.core.transformer.rotary_frequencies import RotaryFrequencies, rotary_frequencies


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin by position, computed once and grown when a sequence is longer.

    Source: Su et al. 2021 (arXiv:2104.09864); see ``rotary_frequencies`` for stretched positions.
    """

    def __init__(self, config: RotaryConfig, *, channels: int, rotary_dim: int) -> None:
        """Remember what decides the frequencies.

        Args:
            config: Base, pairing, and how positions are stretched.
            channels: Of what the tables are applied to: a head, or its part with positions.
            rotary_dim: How many of them, the first ones, are rotated.
        """
        super().__init__()
        self.config, self.channels, self.rotary_dim = config, channels, rotary_dim
        self.interleaved = config.rotary_interleaved
        self._tables: dict[tuple[torch.device, torch.dtype, bool], RotaryTables] = {}

    def forward(self, positions: Sequence[range], like: Tensor, *, length: int) -> RotaryTables:
        """Return the tables of ``positions``, in their order.

        Args:
            positions: Of this forward, on this rank.
            like: Gives device and dtype.
            length: Tokens of the whole sequence, of all ranks and with those still to come;
                LongRoPE turns slower where it is beyond the original length.
        """
        is_long = self.config.rope_is_long(length)
        key, end = (like.device, like.dtype, is_long), max(part.stop for part in positions)
        tables = self._tables.get(key)
        if tables is None or len(tables.cos) < end:
            frequencies = rotary_frequencies(self.config, self.rotary_dim, is_long=is_long)
            tables = self._tables[key] = self._compute(frequencies, end, like)
        return tables._replace(cos=_rows(tables.cos, positions), sin=_rows(tables.sin, positions))

    def _compute(self, frequencies: RotaryFrequencies, length: int, like: Tensor) -> RotaryTables:
        """Compute in fp64 and round once."""
        turns = torch.arange(length, dtype=torch.float64, device=like.device)
        angles = torch.outer(turns, frequencies.speeds.to(like.device))
        cos, sin = angles.cos() * frequencies.magnitude, angles.sin() * frequencies.magnitude
        rest = angles.new_zeros(length, self.channels - self.rotary_dim)
        return RotaryTables(
            cos=torch.cat([self._both(cos, cos), rest + 1.0], dim=1).to(like.dtype),
            sin=torch.cat([self._both(-sin, sin), rest], dim=1).to(like.dtype),
            half=self.rotary_dim // 2,
            interleaved=self.interleaved,
        )

    def _both(self, first: Tensor, second: Tensor) -> Tensor:
        """Put the values of a pair, [length, pairs] each, where its channels are."""
        if self.interleaved:
            return torch.stack([first, second], dim=-1).flatten(-2)
        return torch.cat([first, second], dim=1)


def _rows(table: Tensor, positions: Sequence[range]) -> Tensor:
    parts = [table[part.start : part.stop] for part in positions]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
