"""Compute again in backward what forward would otherwise have kept.

Nothing random is looked up and nothing of a forward lives on a module, so the second time gives the
same bits: dropout is a function of seed, sample and layer, and metrics are assigned, not added.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import torch
from torch.utils.checkpoint import checkpoint

ArgsT = TypeVarTuple("ArgsT")
ResultT = TypeVar("ResultT")


def recomputed(function: Callable[[Unpack[ArgsT]], ResultT], when: bool, *args: *ArgsT) -> ResultT:
    """Return ``function(*args)``; if ``when``, keep only its arguments for backward.

    The graph is that of the first time: a parameter gets one gradient for each use, as without.
    The second time ends at the last tensor that backward asks for, so what follows it (the
    collective that brings rows home, say) is not done again. Every rank of a group must call this
    alike. Without gradients it is a plain call.

    Source: Chen et al. 2016 (arXiv:1604.06174).
    """
    if not (when and torch.is_grad_enabled()):
        return function(*args)
    result: ResultT = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result
