"""LayerNorm and RMSNorm on a CPU, compiled: forward and backward each in one pass over memory.

For rows in bf16 or fp32; statistics, scale and shift are fp32. Twin of the functions for CPUs in
``torch_norm.py``, which need four to eight passes.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import is_for, kernel
from megatron.core.errors import BackendError

SOURCE = Path(__file__).with_suffix(".cpp")
_FAST = "-ffp-contract=fast"  # fused multiply-add
OPTIONS: dict[torch.dtype, Sequence[str]] = {
    torch.float32: (_FAST,),
    torch.bfloat16: (_FAST, "-DBF16"),
}
_GROUP = 64
"""Rows whose gradients of scale and shift are summed together; ``GROUP`` of the source."""


class NormKernel:
    """The compiled functions for rows of one dtype, [n, h] and contiguous."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        """Take the functions of the compiled source."""
        self.dtype = dtype
        self._forward, self._backward = library.norm_forward, library.norm_backward
        place, size = ctypes.c_void_p, (ctypes.c_int64, ctypes.c_int64)
        self._forward.argtypes = [*(place,) * 3, ctypes.c_float, *(place,) * 3, *size]
        self._backward.argtypes = [*(place,) * 9, *size]
        self._forward.restype = self._backward.restype = None

    def forward(
        self, rows: Tensor, scale: Tensor, shift: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Normalise rows; RMSNorm without ``shift``, which is [h] fp32 like ``scale``.

        Returns:
            [n, h] like ``rows``; the means [n] fp32, None of RMSNorm; what rows were multiplied by,
            [n] fp32.
        """
        count, width = rows.shape
        out = torch.empty_like(rows)
        rstd = rows.new_empty(count, dtype=torch.float32)
        mean = None if shift is None else torch.empty_like(rstd)
        self._check(width, (rows,), (scale, shift))
        places = (_place(t) for t in (rows, scale, shift))
        self._forward(*places, eps, *map(_place, (out, mean, rstd)), count, width)
        return out, mean, rstd

    def backward(
        self, grad: Tensor, rows: Tensor, scale: Tensor, mean: Tensor | None, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of rows, scale [h] and shift [h], the latter two in fp32.

        Args:
            grad: Of the output, [n, h] like ``rows``.
            rows: See ``forward``.
            scale: See ``forward``.
            mean: What ``forward`` returned.
            rstd: What ``forward`` returned.
        """
        assert grad.shape == rows.shape, f"{grad.shape=} is not {rows.shape}"
        count, width = rows.shape
        self._check(width, (grad, rows), (scale,))
        for numbers in (rstd,) if mean is None else (mean, rstd):
            assert numbers.dtype == torch.float32, f"{numbers.dtype=}"
            assert numbers.shape == (count,), f"{numbers.shape=} is not of {count} rows"
        d_rows = torch.empty_like(rows)
        sums = rows.new_zeros(2, width, dtype=torch.float32)
        groups = sums.new_empty(2 * width * -(-count // _GROUP))
        places = (_place(t) for t in (grad, rows, scale, mean, rstd, d_rows, *sums, groups))
        self._backward(*places, count, width)
        return d_rows, sums[0], sums[1]

    def _check(self, width: int, matrices: Sequence[Tensor], vectors: Sequence[Any]) -> None:
        """Stop before C would read what it must not."""
        for matrix in matrices:
            assert matrix.dtype == self.dtype, f"{matrix.dtype=} is not {self.dtype}"
            assert matrix.is_contiguous(), f"{matrix.stride()=}"
        for vector in vectors:
            if vector is not None:
                assert vector.dtype == torch.float32, f"{vector.dtype=} is not fp32"
                assert vector.shape == (width,), f"{vector.shape=} is not {width=}"
                assert vector.is_contiguous(), f"{vector.stride()=}"


class CompiledNorm(torch.autograd.Function):
    """LayerNorm with ``bias``, RMSNorm without; saves its input and one or two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm: NormKernel
    ) -> Tensor:
        """Normalise ``x`` [..., h] by ``norm``, which is that of its dtype."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        shift = None if bias is None else bias.float()
        out, mean, rstd = norm.forward(rows, weight.float(), shift, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.norm, ctx.bias_dtype = norm, None if bias is None else bias.dtype
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See ``NormKernel.backward``."""
        x, weight, mean, rstd = ctx.saved_tensors
        rows, d_out = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, grad))
        dx, dw, db = ctx.norm.backward(d_out, rows, weight.float(), mean, rstd)
        d_bias = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
        return dx.view(x.shape), dw.to(weight.dtype), d_bias, None, None


def norm_kernel(x: Tensor) -> NormKernel | None:
    """Return the compiled functions if ``x`` [..., h] is to be normalised by them; else None."""
    if not is_for(x):
        return None
    return kernel(f"normalisation in {str(x.dtype).removeprefix('torch.')}", _MAKERS[x.dtype])


def _compiled(dtype: torch.dtype) -> NormKernel:
    made = NormKernel(load(SOURCE, options=OPTIONS[dtype]), dtype)
    _try_out(made)
    return made


_MAKERS = {
    torch.float32: lambda: _compiled(torch.float32),
    torch.bfloat16: lambda: _compiled(torch.bfloat16),
}


def _try_out(norm: NormKernel) -> None:
    """Compute a few rows and compare with torch: a compiler that errs must not spoil a run."""
    rows = torch.linspace(-3.0, 5.0, 3 * 37).sin().view(3, 37).to(norm.dtype)
    grad, scale = rows.flip(0), torch.linspace(0.5, 1.5, 37)
    for shift in (None, scale.flip(0)):
        leaves = [t.detach().double().requires_grad_() for t in (rows, scale)]
        centred = leaves[0] - (0.0 if shift is None else leaves[0].mean(-1, keepdim=True))
        plain = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * leaves[1]
        want = [plain + (0.0 if shift is None else shift)]
        # of a number: for a gradient that it is given, torch loads sympy
        want += torch.autograd.grad((plain * grad.double()).sum(), leaves)
        out, mean, rstd = norm.forward(rows, scale, shift, 0.1)
        for one, other in zip(
            want, (out, *norm.backward(grad, rows, scale, mean, rstd)), strict=False
        ):
            close = 8 * torch.finfo(other.dtype).eps
            if not torch.allclose(other.double(), one, rtol=close, atol=close * 4):
                raise BackendError("what the C++ compiler made computes something else than torch")


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
