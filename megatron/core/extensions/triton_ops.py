"""Fused kernels of the MoE layer on CUDA, by Triton, which comes with torch's CUDA builds.

Whether they can be used is asked when a layer is built, never in a forward. Triton compiles each
kernel at its first use (about a second), and keeps it on disk. torch's own functions are the twin
that every kernel is tested against: in Triton's interpreter on a CPU, and on a device.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What rows may be; fp64 is left to torch."""


@cache
def unusable() -> str | None:
    """Say why the kernels cannot be used here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def takes(rows: Tensor) -> bool:
    """Return whether the kernels take rows that lie where these do and are typed like them."""
    return rows.is_cuda and rows.dtype in DTYPES


def gather_rows(source: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy rows and change their type in one pass; rows of padding are zeros.

    Args:
        source: [n, h].
        index: [m], int64, the row of ``source`` that each row is; outside of 0 .. n - 1 for a row
            of padding.
        dtype: Of the result.

    Returns:
        [m, h].
    """
    result: Tensor = _kernels().gather_rows(source, index, dtype)
    return result


def sum_rows(rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each token in fp32, in the order of ``slots``.

    Args:
        rows: [num_rows, h].
        slots: [k, num_tokens], int64, rows of each token; outside of 0 .. num_rows - 1 for none.
        dtype: Of the result.

    Returns:
        [num_tokens, h].
    """
    result: Tensor = _kernels().sum_rows(rows, slots, dtype)
    return result


def swiglu(inner: Tensor, probs: Tensor) -> Tensor:
    """Return silu(gate) * up * prob, computed in fp32.

    Args:
        inner: [num_rows, 2 * ffn], first gate, then up.
        probs: [num_rows], fp32.

    Returns:
        [num_rows, ffn] in the dtype of ``inner``.
    """
    result: Tensor = _kernels().swiglu(inner, probs)
    return result


def swiglu_gradient(inner: Tensor, probs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``swiglu``, and its output once more, in one pass.

    Args:
        inner: Its argument, as ``probs``.
        probs: See ``inner``.
        grad: [num_rows, ffn], gradient of its output.

    Returns:
        Gradient of ``inner``; of ``probs``, [num_rows] fp32, each a sum over ffn in a fixed order;
        and [num_rows, ffn], what ``swiglu`` gives.
    """
    results: tuple[Tensor, Tensor, Tensor] = _kernels().swiglu_gradient(inner, probs, grad)
    return results


def zero_empty_(blocks: Tensor, counts: Tensor) -> Tensor:
    """Set the blocks whose count is 0 to zeros, in place; the others are not even read.

    Args:
        blocks: [n, ...], contiguous.
        counts: [n], whole numbers.

    Returns:
        ``blocks``.
    """
    result: Tensor = _kernels().zero_empty_(blocks, counts)
    return result


@cache
def _kernels() -> ModuleType:
    return importlib.import_module("megatron.core.extensions.triton_kernels")
