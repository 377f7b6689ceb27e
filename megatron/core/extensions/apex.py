"""NVIDIA apex, when it is installed. Imported when it is used, never when this file is.

The package index has another project of that name: what counts is ``apex.optimizers.FusedAdam``.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch

from megatron.core.extensions.registry import register


@cache
def unusable() -> str | None:
    """Say why ``apex.optimizers.FusedAdam`` cannot be used here, or None."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    except (ImportError, AttributeError) as error:
        return f"installed, but without apex.optimizers.FusedAdam ({error})"
    return None


@register(
    "adam",
    "apex",
    prefer=-1,
    why="on request; no faster than torch's fused step",
    unusable=unusable,
)
def adam(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """See ``torch_native.adam``. Counts steps in its groups, not in its state."""
    optimizers = importlib.import_module("apex.optimizers")
    optimizer: torch.optim.Optimizer = optimizers.FusedAdam(
        groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True
    )
    return optimizer
