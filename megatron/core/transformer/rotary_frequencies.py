"""How fast each pair of channels turns with the position, for every way to stretch positions. Pure.

All in fp64. What a frequency does is said by its turns within the original length: those with many
turns tell near positions apart and are kept, those with few are slowed down.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.transformer.config.rotary import RotaryConfig


class RotaryFrequencies(NamedTuple):
    """What the tables of cos and sin are made of."""

    speeds: Tensor
    """[pairs], fp64, on the CPU: radians by which a pair turns from one position to the next."""
    magnitude: float
    """Rotated channels are multiplied by it."""


def rotary_frequencies(
    config: RotaryConfig, dim: int, *, is_long: bool = False
) -> RotaryFrequencies:
    """Return the frequencies of ``dim`` rotated channels.

    Args:
        config: Base, and how positions are stretched.
        dim: Rotated channels of a query or key; even.
        is_long: Of ``config.rope_is_long``: LongRoPE has other factors for long sequences.

    Source: Su et al. 2021 (arXiv:2104.09864); linear: Chen et al. 2023 (arXiv:2306.15595); NTK and
    YaRN: Peng et al. 2023 (arXiv:2309.00071), sections 3.1 and 3.2; Llama 3.1: Grattafiori et al.
    2024 (arXiv:2407.21783); LongRoPE: Ding et al. 2024 (arXiv:2402.13753).
    """
    pairs, base, kind = dim // 2, config.rotary_base, config.rope_scaling
    if kind == "ntk":
        base *= config.rope_factor ** (dim / (dim - 2))
    plain = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    speeds = plain
    if kind == "linear":
        speeds = plain / config.rope_factor
    elif kind == "yarn":
        speeds = _blend(plain, _yarn_kept(config, dim), config.rope_factor)
    elif kind == "llama3":
        speeds = _blend(plain, _llama3_kept(config, plain), config.rope_factor)
    elif kind == "longrope":
        factors = config.longrope_long_factor if is_long else config.longrope_short_factor
        speeds = plain / torch.tensor(factors, dtype=torch.float64)
    return RotaryFrequencies(speeds, _magnitude(config))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return by how much YaRN makes queries and keys larger, that attention stays as sharp.

    Args:
        factor: By how much positions are stretched.
        mscale: Weight of the logarithm.

    Source: Peng et al. 2023 (arXiv:2309.00071), eq. 22.
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _blend(plain: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Keep the share ``kept`` of each speed, in [0, 1], and divide the rest by ``factor``."""
    return plain / factor * (1.0 - kept) + plain * kept


def _yarn_kept(config: RotaryConfig, dim: int) -> Tensor:
    """Return the share of each speed that is kept: a ramp over the pairs."""
    length = config.rope_original_length
    assert length is not None, "YaRN has an original length"

    def pair_with(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    first, last = pair_with(config.yarn_beta_fast), pair_with(config.yarn_beta_slow)
    if config.yarn_correction_range_round_to_int:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0.0), min(last, dim - 1.0)
    if first == last:
        last += 0.001  # a step instead of a ramp
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - first) / (last - first)
    return 1.0 - ramp.clamp(0.0, 1.0)


def _llama3_kept(config: RotaryConfig, plain: Tensor) -> Tensor:
    """Return the share of each speed that is kept: a ramp over the turns."""
    length = config.rope_original_length
    assert length is not None, "llama3 has an original length"
    low, high = config.rope_scaling_low_freq_factor, config.rope_scaling_high_freq_factor
    turns = length * plain / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _magnitude(config: RotaryConfig) -> float:
    kind, factor = config.rope_scaling, config.rope_factor
    if kind not in ("yarn", "longrope"):
        return 1.0
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    if kind == "longrope":
        length = config.rope_original_length
        assert length is not None, "LongRoPE has an original length"
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(length))
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(factor, config.mscale) / yarn_mscale(factor, config.mscale_all_dim)
    return yarn_mscale(factor)
