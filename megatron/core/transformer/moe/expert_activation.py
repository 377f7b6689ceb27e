"""The activation inside an expert, weighted by the probability of each row.

Weighting before the second matrix saves a tensor of rows x hidden. Only the input is kept for
backward. On the CPU rows go through in blocks that stay in the cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = 1 << 17  # of the input, about half of a small level-2 cache in fp32


def weighted_activation(inner: Tensor, probs: Tensor, *, gated: bool) -> Tensor:
    """Activate ``inner`` and multiply each row by its prob, computed in fp32 or wider.

    Args:
        inner: [num_rows, ffn], or [num_rows, 2 * ffn] when gated: first gate, then up.
        probs: [num_rows], fp32 or fp64.
        gated: SwiGLU (arXiv:2002.05202) instead of exact GELU (arXiv:1606.08415).

    Returns:
        [num_rows, ffn] in the dtype of ``inner``.
    """
    out: Tensor = _WeightedActivation.apply(inner, probs, gated)
    return out


class _WeightedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, probs: Tensor, gated: bool) -> Tensor:
        ctx.save_for_backward(inner, probs)
        ctx.gated = gated
        out = inner.new_empty(inner.shape[0], inner.shape[1] // (2 if gated else 1))
        for block in _blocks(inner):
            wide = _widen(inner[block])
            out[block] = _activate(wide, gated).mul_(probs[block].unsqueeze(1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        inner, probs = ctx.saved_tensors
        grad_inner, grad_probs = torch.empty_like(inner), torch.empty_like(probs)
        for block in _blocks(inner):
            wide, wide_grad = _widen(inner[block]), _widen(grad[block])
            grad_probs[block] = torch.linalg.vecdot(_activate(wide, ctx.gated), wide_grad)
            _differentiate(
                wide, wide_grad * probs[block].unsqueeze(1), grad_inner[block], ctx.gated
            )
        return grad_inner, grad_probs, None


def _activate(inner: Tensor, gated: bool) -> Tensor:
    if not gated:
        return nn.functional.gelu(inner)
    gate, up = inner.chunk(2, dim=1)
    return nn.functional.silu(gate).mul_(up)


def _differentiate(inner: Tensor, grad: Tensor, out: Tensor, gated: bool) -> None:
    """Write the gradient of ``inner`` into ``out``, given that of the activation."""
    if not gated:
        out.copy_(torch.ops.aten.gelu_backward(grad, inner))
        return
    gate, up = inner.chunk(2, dim=1)
    grad_gate, grad_up = out.chunk(2, dim=1)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    grad_up.copy_(nn.functional.silu(gate).mul_(grad))


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(inner: Tensor) -> Iterator[slice]:
    """Cut rows into blocks that fit a CPU's cache; other devices take all at once."""
    num_rows, width = inner.shape
    step = max(_BLOCK_ELEMENTS // width, 16) if inner.device.type == "cpu" else max(num_rows, 1)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
