"""Rotation of heads by position in one compiled pass, from any layout to any other."""

import ctypes
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import is_for, kernel
from megatron.core.cpu_kernels.heads import RotaryTables, Rotation, View, fits, rotation_by, view_of
from megatron.core.errors import BackendError

_SOURCE = Path(__file__).with_name("rotary.cpp")
_ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


class _Task(ctypes.Structure):
    """The same fields, in the same order, as Task in rotary.cpp."""

    _fields_ = (
        *((name, View) for name in ("from", "to")),
        ("rotation", Rotation),
        *((name, ctypes.c_int64) for name in ("b", "groups", "heads", "s", "channels")),
        ("sign", ctypes.c_double),
    )


class RotaryKernel:
    """x * cos + swapped(x) * sin, computed in fp32 and rounded once."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Compile.

        Raises:
            BackendError: It cannot be compiled.
        """
        self.dtype = dtype
        name = str(dtype).removeprefix("torch.")
        self._rotate = getattr(load(_SOURCE), f"rotate_{name}")
        self._rotate.restype = None
        self._try_out()

    def __call__(
        self, x: Tensor, out: Tensor, tables: RotaryTables | None, *, back: bool = False
    ) -> None:
        """Write ``x``, rotated, over ``out``.

        Args:
            x: [b, groups, heads, s, d], channels side by side.
            out: The same shape, elsewhere.
            tables: For these s positions; None copies.
            back: Apply the transposed map.
        """
        assert x.shape == out.shape, f"{x.shape=} {out.shape=}"
        task = _Task(
            view_of(x, self.dtype),
            view_of(out, self.dtype),
            rotation_by(tables, x),
            *x.shape,
            -1.0 if back else 1.0,
        )
        self._rotate(ctypes.byref(task))

    def _try_out(self) -> None:
        """Compare a few rows with torch.

        Raises:
            BackendError: They differ.
        """
        s, d = 3, 32
        x, cos, sin = torch.arange(3.0 * s * d).square().sin().view(3, 1, 1, 1, s, d).to(self.dtype)
        out = torch.empty_like(x)
        self(x, out, RotaryTables(cos[0, 0, 0], sin[0, 0, 0], d // 2))
        wanted = x.double() * cos + x.double().roll(d // 2, dims=-1) * sin
        error = (out - wanted).abs().max().item()
        if not error < _ERROR[self.dtype]:
            raise BackendError(f"rotation in {self.dtype} is off by {error:.1e}")


def rotary_kernel(x: Tensor) -> RotaryKernel | None:
    """Return the kernel for ``x`` [..., d]; None to compute with torch."""
    if not (is_for(x) and fits(x.shape[-1])):
        return None
    return kernel(f"rotation in {x.dtype}", partial(RotaryKernel, x.dtype))
