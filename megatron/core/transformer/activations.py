"""Activations of an MLP: from the output of its first matrix to the input of its second.

Only the input is kept for backward. The functions of one number are shared with the experts, which
weigh their rows as well (``moe/expert_activation.py``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.transformer.config.activation import GELU, SWIGLU, ActivationKind
from megatron.core.transformer.precision import compute_dtype

QUICK_GELU_SLOPE = 1.702


def activation_of(kind: ActivationKind) -> Callable[[Tensor], Tensor]:
    """Return what computes ``kind``: [..., ffn], or [..., 2 * ffn] when gated, to [..., ffn]."""
    if kind == GELU:
        return gelu
    if kind == SWIGLU:
        return swiglu
    return partial(_apply, kind)


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


class Pointwise(NamedTuple):
    """A function of one number and its gradient, both written into a tensor that is given."""

    value: Callable[[Tensor, Tensor], Tensor]
    """(x, out) -> out, which may be ``x``."""
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(gradient of the value, x, out) -> out, which may be the first of them."""


def _gelu(approximate: str) -> Pointwise:
    def value(x: Tensor, out: Tensor) -> Tensor:
        torch.ops.aten.gelu.out(x, approximate=approximate, out=out)
        return out

    def gradient(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
        torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out)
        return out

    return Pointwise(value, gradient)


def _silu(x: Tensor, out: Tensor) -> Tensor:
    torch.ops.aten.silu.out(x, out=out)
    return out


def _silu_gradient(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    return out


def _quick_gelu(x: Tensor, out: Tensor) -> Tensor:
    return torch.mul((x * QUICK_GELU_SLOPE).sigmoid_(), x, out=out)


def _quick_gelu_gradient(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return _silu_gradient(grad, x * QUICK_GELU_SLOPE, out)  # quick_gelu(x) = silu(1.702 x) / 1.702


def _squared_relu(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(x, min=0.0, out=out).square_()


def _squared_relu_gradient(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.mul(grad, x.clamp(min=0.0).mul_(2.0), out=out)


POINTWISE: dict[str, Pointwise] = {
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "silu": Pointwise(_silu, _silu_gradient),
    "quick_gelu": Pointwise(_quick_gelu, _quick_gelu_gradient),
    "squared_relu": Pointwise(_squared_relu, _squared_relu_gradient),
}
"""By ``ActivationKind.function``. Sources: gelu (both) and quick_gelu, arXiv:1606.08415; silu,
arXiv:1702.03118; squared_relu, arXiv:2109.08668."""


def limited_gate(kind: ActivationKind, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the gate as the function reads it; itself where nothing limits it."""
    return gate if kind.clamp is None else torch.clamp(gate, max=kind.clamp, out=out)


def limited_up(kind: ActivationKind, up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return what the gate is multiplied with; ``up`` itself where nothing changes it."""
    if kind.clamp is not None:
        return torch.clamp(up, -kind.clamp, kind.clamp, out=out).add_(kind.offset)
    return torch.add(up, kind.offset, out=out) if kind.offset else up


def stop_gradients(
    kind: ActivationKind, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor
) -> None:
    """Set gradients to 0 where ``limited_gate`` or ``limited_up`` cut their argument off."""
    if kind.clamp is not None:
        grad_gate.masked_fill_(gate > kind.clamp, 0.0)
        grad_up.masked_fill_(up.abs() > kind.clamp, 0.0)


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


def _apply(kind: ActivationKind, x: Tensor) -> Tensor:
    out: Tensor = (_GatedActivation if kind.gated else _PlainActivation).apply(x, kind)
    return out


class _PlainActivation(torch.autograd.Function):
    """A function of each number, in fp32 or wider; saves its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: ActivationKind) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = POINTWISE[kind.function]
        wide = x.to(compute_dtype(x.dtype))
        out: Tensor = ctx.function.value(wide, torch.empty_like(wide))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        wide = x.to(compute_dtype(x.dtype))
        dx: Tensor = ctx.function.gradient(grad.to(wide.dtype), wide, torch.empty_like(wide))
        return dx.to(x.dtype), None


class _GatedActivation(torch.autograd.Function):
    """Any gated kind, in fp32 or wider; saves its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: ActivationKind) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        gate, up = x.to(compute_dtype(x.dtype)).chunk(2, dim=-1)
        gate, up = limited_gate(kind, gate), limited_up(kind, up)
        out = POINTWISE[kind.function].value(gate, torch.empty_like(gate))
        return out.mul_(up).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        kind, function = ctx.kind, POINTWISE[ctx.kind.function]
        wide = x.to(compute_dtype(x.dtype))
        gate, up = wide.chunk(2, dim=-1)
        used_gate, used_up = limited_gate(kind, gate), limited_up(kind, up)
        grad, dx = grad.to(wide.dtype), torch.empty_like(wide)
        d_gate, d_up = dx.chunk(2, dim=-1)
        torch.mul(function.value(used_gate, torch.empty_like(grad)), grad, out=d_up)
        function.gradient(grad * used_up, used_gate, d_gate)
        stop_gradients(kind, gate, up, d_gate, d_up)
        return dx.to(x.dtype), None
