"""Activations of an MLP: from the output of its first matrix to the input of its second."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def gelu(x: Tensor) -> Tensor:
    """Return x * Phi(x), Phi the normal distribution function (exact, no tanh).

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415).
    """
    return nn.functional.gelu(x)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up of ``x`` [..., 2 * ffn], gate the first half: [..., ffn].

    Source: Shazeer 2020 (arXiv:2002.05202).
    """
    out: Tensor = _SwiGLU.apply(x)
    return out


class _SwiGLU(torch.autograd.Function):
    """Saves its input only, and writes both halves of the gradient into one tensor."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        d_gate, d_up = dx.chunk(2, dim=-1)
        torch.mul(nn.functional.silu(gate), grad, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return dx
