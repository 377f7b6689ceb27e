"""Exponentials of rows of logits and their sums on a CPU, compiled: once through memory.

For bf16 and fp32, computed in fp32.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import is_for, kernel
from megatron.core.errors import BackendError

SOURCE = Path(__file__).with_suffix(".cpp")
_FAST = "-ffp-contract=fast"  # fused multiply-add
OPTIONS: dict[torch.dtype, Sequence[str]] = {
    torch.float32: (_FAST,),
    torch.bfloat16: (_FAST, "-DBF16"),
}


class SoftmaxKernel:
    """The compiled functions for contiguous logits [n, v] of one dtype."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        """Take the functions of the compiled source."""
        self.dtype = dtype
        self._max, self._exp = library.max_of_rows, library.exp_of_rows
        place, size, factor = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._max.argtypes = [place, size, factor, place, size, size]
        self._exp.argtypes = [place, size, factor, place, ctypes.c_int, place, size, size]
        self._max.restype = self._exp.restype = None

    def max(self, logits: Tensor, columns: int, factor: float = 1.0) -> Tensor:
        """Return ``factor``, above 0, times the largest of the first ``columns``: [n] fp32."""
        rows, width = self._check(logits, columns)
        tops = logits.new_empty(rows, dtype=torch.float32)
        self._max(logits.data_ptr(), width, factor, tops.data_ptr(), rows, columns)
        return tops

    def exp_(
        self, logits: Tensor, columns: int, factor: float = 1.0, tops: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make ``logits`` exp(factor * logits - tops), and 0 from ``columns`` on.

        Args:
            logits: [n, v].
            columns: Those that count.
            factor: Above 0.
            tops: [n] fp32, no smaller than what ``max`` returns; when None, that.

        Returns:
            ``tops``, and the sums of the rows before they were rounded: [n] fp32.
        """
        rows, width = self._check(logits, columns)
        is_given = tops is not None
        if tops is None:
            tops = logits.new_empty(rows, dtype=torch.float32)
        assert tops.dtype == torch.float32, f"{tops.dtype=}"
        assert tops.shape == (rows,), f"{tops.shape=} is not of {rows} rows"
        assert tops.is_contiguous(), f"{tops.stride()=}"
        totals = torch.empty_like(tops)
        self._exp(
            *(logits.data_ptr(), width, factor, tops.data_ptr(), is_given),
            *(totals.data_ptr(), rows, columns),
        )
        return tops, totals

    def _check(self, logits: Tensor, columns: int) -> tuple[int, int]:
        """Stop before C would read or write what it must not."""
        rows, width = logits.shape
        assert logits.dtype == self.dtype, f"{logits.dtype=} is not {self.dtype}"
        assert logits.is_contiguous(), f"{logits.stride()=}"
        assert 0 <= columns <= width, f"{columns=} of {width}"
        return rows, width


def softmax_kernel(logits: Tensor) -> SoftmaxKernel | None:
    """Return the compiled functions if they are to be used for ``logits``; else None."""
    if not is_for(logits):
        return None
    return kernel(
        f"the softmax of logits in {str(logits.dtype).removeprefix('torch.')}",
        _MAKERS[logits.dtype],
    )


def _compiled(dtype: torch.dtype) -> SoftmaxKernel:
    made = SoftmaxKernel(load(SOURCE, options=OPTIONS[dtype]), dtype)
    _try_out(made)
    return made


_MAKERS = {
    torch.float32: lambda: _compiled(torch.float32),
    torch.bfloat16: lambda: _compiled(torch.bfloat16),
}


def _try_out(softmax: SoftmaxKernel) -> None:
    """Compute a few rows and compare with torch: a compiler that errs must not spoil a run."""
    logits = torch.linspace(-100.0, 40.0, 3 * 91).view(3, 91).sin().mul(60).to(softmax.dtype)
    wide = logits.float()[:, :85] * 0.5
    want = (wide - wide.amax(1, keepdim=True)).exp()
    most = softmax.max(logits, 85, 0.5)
    tops, totals = softmax.exp_(logits, 85, 0.5)
    if not (
        torch.equal(most, tops)
        and torch.equal(tops, wide.amax(1))
        and torch.allclose(totals, want.sum(1), rtol=1e-5)
        and torch.allclose(logits[:, :85].float(), want.to(softmax.dtype).float(), rtol=1e-2)
        and not logits[:, 85:].any()
    ):
        raise BackendError("what the C++ compiler made computes something else than torch")
