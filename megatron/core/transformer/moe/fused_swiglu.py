"""The weighted SwiGLU of an expert in one pass over memory, by C++ compiled when a run begins.

For CPUs, bf16 and fp32. torch needs a dozen passes, so a bf16 layer waits for memory. One thread
computes.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import kernel, using
from megatron.core.errors import BackendError
from megatron.core.transformer.config.activation import SWIGLU, ActivationKind
from megatron.core.transformer.moe.expert_activation import (
    IN_TORCH,
    Activation,
    ActivationGradient,
)

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
"""What is computed in, and with which options of the compiler."""


class FusedSwiGLU:
    """The compiled functions of one dtype; for tensors on a CPU."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        rows = (pointer, number)
        size = (number, number)
        self._activate, self._differentiate = library.activate, library.differentiate
        self._activate.argtypes = [*rows, pointer, *rows, *size]
        self._differentiate.argtypes = [
            *(*rows, pointer, *rows, *rows, pointer, *rows),
            *size,
        ]
        self._activate.restype = self._differentiate.restype = None

    def activate(
        self, inner: Tensor, probs: Tensor, *, kind: ActivationKind, out: Tensor
    ) -> Tensor:
        """See ``expert_activation.activate``."""
        assert kind == SWIGLU, f"only plain SwiGLU is fused, {kind=}"
        num_rows, width = out.shape
        probs = probs.contiguous()
        self._check(num_rows, {width: (out,), 2 * width: (inner,)}, (probs,))
        self._activate(*_place(inner), probs.data_ptr(), *_place(out), num_rows, width)
        return out

    def differentiate(
        self,
        inner: Tensor,
        probs: Tensor,
        grad: Tensor,
        *,
        kind: ActivationKind,
        out: ActivationGradient,
    ) -> ActivationGradient:
        """See ``expert_activation.differentiate``."""
        assert kind == SWIGLU, f"only plain SwiGLU is fused, {kind=}"
        num_rows, width = out.activated.shape
        probs = probs.contiguous()
        matrices = {width: (grad, out.activated), 2 * width: (inner, out.inner)}
        self._check(num_rows, matrices, (probs, out.probs))
        self._differentiate(
            *_place(inner),
            probs.data_ptr(),
            *_place(grad),
            *_place(out.inner),
            out.probs.data_ptr(),
            *_place(out.activated),
            num_rows,
            width,
        )
        return out

    def _check(
        self, num_rows: int, matrices: Mapping[int, Sequence[Tensor]], vectors: Sequence[Tensor]
    ) -> None:
        """Stop before C would read or write what it must not; the keys are widths."""
        expected: list[tuple[Tensor, tuple[int, ...], torch.dtype]] = [
            (x, (num_rows, width), self.dtype) for width in matrices for x in matrices[width]
        ]
        expected += [(x, (num_rows,), torch.float32) for x in vectors]
        for tensor, shape, dtype in expected:
            assert tensor.shape == shape, f"{tensor.shape=} is not {shape}"
            assert tensor.dtype == dtype, f"{tensor.dtype=} is not {dtype}"
            assert tensor.device.type == "cpu", f"{tensor.device=}"
            assert tensor.stride(-1) == 1 or tensor.numel() < 2, f"{tensor.stride()=}"


def fused_swiglu(dtype: torch.dtype, *, required: bool = False) -> Activation:
    """Return the compiled functions for ``dtype``, torch's where there are none.

    Args:
        dtype: Of rows and weights.
        required: Whatever ``--cpu-kernels`` says, and fail where they cannot be had.

    Raises:
        BackendError: There is no compiler, it failed, or what it made computes something else.
    """
    name = f"the activation of experts in {str(dtype).removeprefix('torch.')}"
    if required:
        try:
            with using("compiled"):
                found = kernel(name, lambda: _made(dtype))
        except BackendError as error:
            raise BackendError(
                f"--moe-fused-activation compiled: {error}; or use --moe-fused-activation off"
            ) from error
    else:
        found = kernel(name, lambda: _made(dtype)) if dtype in DTYPES else None
    return IN_TORCH if found is None else Activation(found.activate, found.differentiate)


def _made(dtype: torch.dtype) -> FusedSwiGLU:
    if dtype not in DTYPES:
        raise BackendError(f"there is no fused activation for {dtype}")
    made = FusedSwiGLU(load(SOURCE, options=DTYPES[dtype]), dtype)
    _try_out(made)
    return made


def _try_out(fused: FusedSwiGLU) -> None:
    """Compute a few rows and compare with torch: a compiler that errs must not spoil a run."""
    num_rows, width = 3, 37
    gate = torch.linspace(-30.0, 30.0, num_rows * width).view(num_rows, width)
    inner = torch.cat((gate, gate.flip(0) / 8), dim=1).to(fused.dtype)
    probs, grad = torch.tensor([0.25, 1.0, 0.5]), gate.flip(1).div(16).to(fused.dtype)
    results = []
    for way in (IN_TORCH, fused):
        active = way.activate(inner, probs, kind=SWIGLU, out=torch.empty_like(grad))
        made = ActivationGradient(*map(torch.empty_like, (inner, probs, grad)))
        results.append((active, *way.differentiate(inner, probs, grad, kind=SWIGLU, out=made)))
    for want, got in zip(*results, strict=True):
        close = 8 * torch.finfo(want.dtype).eps
        if not torch.allclose(got, want, rtol=close, atol=close * float(want.abs().max())):
            raise BackendError("what the compiler made computes something else than torch")


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return address and length of a row."""
    return tensor.data_ptr(), tensor.stride(0)
