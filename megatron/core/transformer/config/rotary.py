"""Options of rotary positions. TransformerConfig inherits them."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class RotaryConfig:
    """Rotary positions."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    rotary_percent: float = 1.0
    """Share of each head that is rotated, in (0, 1]."""

    rotary_interleaved: bool = False
    """Rotate channels 2 i and 2 i + 1 of a head together, not i and i + half of them."""
