"""Rotary positions written out: one head of one position, one pair of channels at a time."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def rotation(config, length: int) -> Callable[[Tensor, int], Tensor] | None:
    """What ``config`` does to a head at a position of a sequence of ``length``; None: nothing."""
    del length
    if config.position_embedding_type != "rope":
        return None
    dim = int(config.head_dim * config.rotary_percent) // 2 * 2
    speeds = [float(config.rotary_base) ** (-2 * i / dim) for i in range(dim // 2)]
    return functools.partial(rotate, speeds=speeds, interleaved=config.rotary_interleaved)


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
