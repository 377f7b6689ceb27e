"""The activation inside an expert, weighted by the probability of each row.

Weighting before the second matrix saves a tensor of rows x hidden. Computed in fp32 or wider, and
in backward from the input alone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.core.transformer.precision import compute_dtype


def weighted_activation(inner: Tensor, probs: Tensor, *, gated: bool) -> Tensor:
    """Activate ``inner`` and multiply each row by its prob; keeps only ``inner`` for backward.

    Args:
        inner: [num_rows, ffn], or [num_rows, 2 * ffn] when gated: first gate, then up.
        probs: [num_rows], fp32 or fp64.
        gated: SwiGLU (arXiv:2002.05202) instead of exact GELU (arXiv:1606.08415).

    Returns:
        [num_rows, ffn] in the dtype of ``inner``.
    """
    out: Tensor = _WeightedActivation.apply(inner, probs, gated)
    return out


class ActivationGradient(NamedTuple):
    """What backward needs of a weighted activation."""

    inner: Tensor
    """Gradient of ``inner``, in its shape and dtype."""
    probs: Tensor
    """[num_rows], gradient of ``probs``."""
    activated: Tensor
    """[num_rows, ffn], what the forward returned."""


def activate(inner: Tensor, probs: Tensor, *, gated: bool) -> Tensor:
    """Compute ``weighted_activation`` without autograd."""
    wide = _widen(inner)
    if gated:
        gate, up = wide.chunk(2, dim=1)
        active = nn.functional.silu(gate).mul_(up)
    else:
        active = nn.functional.gelu(wide)
    return active.mul_(probs.unsqueeze(1)).to(inner.dtype)


def differentiate(inner: Tensor, probs: Tensor, grad: Tensor, *, gated: bool) -> ActivationGradient:
    """Compute the gradients of ``weighted_activation``, and its output once more.

    Args:
        inner: Its argument, as ``probs`` and ``gated``.
        probs: See ``inner``.
        grad: [num_rows, ffn], gradient of its output.
        gated: See ``inner``.
    """
    wide, grad, weight = _widen(inner), _widen(grad), probs.unsqueeze(1)
    if not gated:
        active = nn.functional.gelu(wide)
        grad_probs = torch.linalg.vecdot(active, grad)
        grad_inner = torch.ops.aten.gelu_backward(grad * weight, wide)
        return ActivationGradient(
            grad_inner.to(inner.dtype), grad_probs, active.mul_(weight).to(inner.dtype)
        )
    gate, up = wide.chunk(2, dim=1)
    grad_inner = torch.empty_like(inner)
    grad_gate, grad_up = grad_inner.chunk(2, dim=1)
    silu = nn.functional.silu(gate)
    active = silu * up
    grad_probs = torch.linalg.vecdot(active, grad)
    weighted = grad * weight
    torch.mul(weighted, silu, out=grad_up)
    torch.ops.aten.silu_backward(weighted.mul_(up), gate, grad_input=grad_gate)
    return ActivationGradient(grad_inner, grad_probs, active.mul_(weight).to(inner.dtype))


class _WeightedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, probs: Tensor, gated: bool) -> Tensor:
        ctx.save_for_backward(inner, probs)
        ctx.gated = gated
        return activate(inner, probs, gated=gated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        inner, probs = ctx.saved_tensors
        found = differentiate(inner, probs, grad, gated=ctx.gated)
        return found.inner, found.probs, None


def _widen(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))
