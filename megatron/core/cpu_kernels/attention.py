"""Causal attention in compiled blocks: memory grows with the sequence, not with its square.

Products are those of torch's own library for small blocks (AMX in bf16). Threads share out the
groups of samples, each computed by one of them, so their number changes no bit.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import is_for, kernel
from megatron.core.cpu_kernels.heads import RotaryTables, Rotation, View, fits, rotation_by, view_of
from megatron.core.errors import BackendError

_SOURCE = Path(__file__).with_name("attention.cpp")
_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class _Task(ctypes.Structure):
    """The same fields, in the same order, as Task in attention.cpp."""

    _fields_ = (
        *((name, View) for name in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")),
        ("lse", ctypes.c_void_p),
        ("rotation", Rotation),
        *((name, ctypes.c_int64) for name in ("b", "groups", "heads", "s", "d", "e", "window")),
        ("scale", ctypes.c_double),
    )


class Heads(NamedTuple):
    """Queries, keys and values of a layer, or gradients of them; channels lie side by side."""

    query: Tensor
    """[b, groups, heads of a group, s, d]"""
    key: Tensor
    """[b, groups, 1, s, d]"""
    value: Tensor
    """[b, groups, 1, s, e]"""


class Found(NamedTuple):
    """What attention made of ``Heads``."""

    out: Tensor
    """[b, groups, heads of a group, s, e], in any layout with channels side by side."""
    lse: Tensor
    """fp32 [b, groups, heads of a group, s], for backward."""


class AttentionKernel:
    """softmax(scale q k) v over each position's past, or the window of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Compile.

        Raises:
            BackendError: It cannot be compiled, or this processor has no such products.
        """
        library = load(_SOURCE, with_torch=True)
        name = str(dtype).removeprefix("torch.")
        self.dtype = dtype
        self._forward = getattr(library, f"forward_{name}")
        self._backward = getattr(library, f"backward_{name}")
        self._try_out()

    def forward(
        self,
        heads: Heads,
        found: Found,
        tables: RotaryTables | None,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        """Write ``found``.

        Args:
            heads: Of s positions.
            found: Written.
            tables: Rotation of queries and keys before they are multiplied; None for none.
            scale: Of products of queries and keys; above 0.
            window: Positions that a query sees before its own; None for all.
        """
        self._run(self._forward, self._task(heads, found, tables, scale, window))

    def backward(
        self,
        heads: Heads,
        found: Found,
        d_out: Tensor,
        grads: Heads,
        tables: RotaryTables | None,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        """Write the gradients of ``heads``.

        Args:
            heads: As in forward.
            found: Of forward.
            d_out: Gradient of ``found.out``.
            grads: Written; shaped like ``heads``.
            tables: As in forward.
            scale: As in forward.
            window: As in forward.
        """
        task = self._task(heads, found, tables, scale, window)
        assert d_out.shape == found.out.shape, f"{d_out.shape=} {found.out.shape=}"
        for name, tensor, like in zip(("dq", "dk", "dv"), grads, heads, strict=True):
            assert tensor.shape == like.shape, f"{name} {tensor.shape=} {like.shape=}"
            setattr(task, name, view_of(tensor, self.dtype))
        task.d_out = view_of(d_out, self.dtype)
        self._run(self._backward, task)

    def _task(
        self,
        heads: Heads,
        found: Found,
        tables: RotaryTables | None,
        scale: float,
        window: int | None,
    ) -> _Task:
        (b, groups, count, s, d), e = heads.query.shape, heads.value.shape[-1]
        assert heads.key.shape == (b, groups, 1, s, d), f"{heads.key.shape=} {heads.query.shape=}"
        assert heads.value.shape == (b, groups, 1, s, e), f"{heads.value.shape=}"
        assert found.out.shape == (b, groups, count, s, e), f"{found.out.shape=}"
        assert found.lse.shape == (b, groups, count, s), f"{found.lse.shape=}"
        assert found.lse.is_contiguous(), f"{found.lse.stride()=}"
        assert found.lse.dtype == torch.float32, f"{found.lse.dtype=}"
        assert scale > 0.0, f"{scale=}"
        task = _Task()
        for name, tensor in zip(("q", "k", "v", "out"), (*heads, found.out), strict=True):
            setattr(task, name, view_of(tensor, self.dtype))
        task.lse, task.rotation = found.lse.data_ptr(), rotation_by(tables, heads.query)
        task.b, task.groups, task.heads = b, groups, count
        task.s, task.d, task.e, task.scale = s, d, e, scale
        task.window = s if window is None else min(window, s)
        return task

    def _run(self, function: Callable[..., int], task: _Task) -> None:
        if function(ctypes.byref(task)):
            raise BackendError(f"torch has no product of blocks in {self.dtype} for this processor")

    def _try_out(self) -> None:
        """Compare a few rows with torch.

        Raises:
            BackendError: They differ.
        """
        s, d = 67, 32
        drawn = torch.arange(5.0 * s * d).square().sin().view(1, 1, 5, s, d).to(self.dtype)
        heads = Heads(drawn[:, :, :2], drawn[:, :, 2:3], drawn[:, :, 3:4])
        found = Found(torch.empty_like(heads.query), torch.empty(1, 1, 2, s))
        d_out = drawn[:, :, 3:]
        grads = Heads(*(torch.empty_like(x) for x in heads))
        self.forward(heads, found, None, scale=1.0, window=None)
        self.backward(heads, found, d_out, grads, None, scale=1.0, window=None)
        q, k, v, g = (x.double() for x in (*heads, d_out))
        later = torch.ones(s, s, dtype=torch.bool).triu(1)
        weights = (q @ k.mT).masked_fill(later, float("-inf")).softmax(dim=-1)
        d_scores = weights * (g @ v.mT - (g * (weights @ v)).sum(dim=-1, keepdim=True))
        wanted = (
            weights @ v,
            d_scores @ k,
            (d_scores.mT @ q).sum(dim=2, keepdim=True),
            (weights.mT @ g).sum(dim=2, keepdim=True),
        )
        for got, right in zip((found.out, *grads), wanted, strict=True):
            error = ((got - right).abs().max() / right.abs().max()).item()
            if not error < _ERROR[self.dtype]:
                raise BackendError(f"attention in {self.dtype} is off by {error:.1e}")


def attention_kernel(query: Tensor, value: Tensor) -> AttentionKernel | None:
    """Return the kernel for these, [..., d] and [..., e]; None to compute with torch."""
    if not (is_for(query) and fits(query.shape[-1], value.shape[-1])):
        return None
    return kernel(f"attention in {query.dtype}", partial(AttentionKernel, query.dtype))
