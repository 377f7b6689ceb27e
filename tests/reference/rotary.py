"""Rotary positions written out: one head of one position, one pair of channels at a time.

Frequencies too are computed one by one, by the sentences of the papers, without tensors.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def rotation(config, length: int) -> Callable[[Tensor, int], Tensor] | None:
    """What ``config`` does to a head at a position of a sequence of ``length``; None: nothing."""
    if config.position_embedding_type not in ("rope", "yarn"):
        return None
    dim = int(config.head_dim * config.rotary_percent) // 2 * 2
    return functools.partial(
        rotate,
        speeds=[speed(config, dim, pair, length) for pair in range(dim // 2)],
        interleaved=config.rotary_interleaved,
        factor=magnitude(config),
    )


def kind(config) -> str:
    """How positions are stretched."""
    if config.position_embedding_type == "yarn" or config.rope_type == "yarn":
        return "yarn"
    if config.use_rope_scaling:
        return "llama3"
    if config.rotary_seq_len_interpolation_factor:
        return "linear"
    return config.rope_scaling_type


def speed(config, dim: int, pair: int, length: int) -> float:
    """Radians by which ``pair`` turns from a position to the next."""
    base, scaling = float(config.rotary_base), kind(config)
    plain = 1 / base ** (2 * pair / dim)
    factor = config.rotary_seq_len_interpolation_factor or config.rope_scaling_factor
    original = config.rope_scaling_original_max_position_embeddings
    if scaling == "linear":
        return plain / factor
    if scaling == "ntk":
        return 1 / (base * factor ** (dim / (dim - 2))) ** (2 * pair / dim)
    if scaling == "llama3":
        turns = (original or 8192) * plain / (2 * math.pi)
        low, high = config.rope_scaling_low_freq_factor, config.rope_scaling_high_freq_factor
        slow = plain / (factor or 8)
        if turns < low:
            return slow
        if turns > high:
            return plain
        share = (turns - low) / (high - low)
        return (1 - share) * slow + share * plain
    if scaling == "yarn":
        share = _yarn_slowed(config, dim, pair, original or 4096)
        return share * plain / factor + (1 - share) * plain
    if scaling == "longrope":
        is_long = length > original
        return (
            plain / (config.longrope_long_factor if is_long else config.longrope_short_factor)[pair]
        )
    return plain


def _yarn_slowed(config, dim: int, pair: int, original: int) -> float:
    """Share of YaRN's interpolation in a pair, between the pairs with many and with few turns."""
    ends = []
    for turns in (config.yarn_beta_fast, config.yarn_beta_slow):
        # base ** (2 i / dim) = original / (2 pi turns), solved for i
        ends.append(dim / 2 * math.log(original / (2 * math.pi * turns), config.rotary_base))
    if config.yarn_correction_range_round_to_int:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dim - 1)
    if first == last:
        last += 0.001
    return min(max((pair - first) / (last - first), 0), 1)


def magnitude(config) -> float:
    """What rotated channels are multiplied by."""
    scaling, given = kind(config), config.rope_attention_factor
    if scaling not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return given
    original = config.rope_scaling_original_max_position_embeddings
    if scaling == "longrope":
        factor = config.rope_scaling_factor or config.max_position_embeddings / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def larger(weight: float) -> float:
        return 1 + 0.1 * weight * math.log(max(config.rope_scaling_factor, 1))

    if config.mscale_all_dim:
        return larger(config.mscale) / larger(config.mscale_all_dim)
    return larger(1)


def rotate(
    x: Tensor, position: int, *, speeds: list[float], interleaved: bool, factor: float = 1.0
) -> Tensor:
    """Rotate one head ``x`` [d]: pair i turns by position * speeds[i], and grows by ``factor``."""
    out = list(x)
    for i, speed in enumerate(speeds):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + len(speeds))
        angle = torch.tensor(position * speed, dtype=torch.float64, device=x.device)
        cos, sin = (factor * angle.cos()).to(x.dtype), (factor * angle.sin()).to(x.dtype)
        out[a] = x[a] * cos - x[b] * sin
        out[b] = x[b] * cos + x[a] * sin
    return torch.stack(out)
