"""The gradient of a bf16 weight, added to its fp32 sum without being rounded on the way.

torch multiplies bf16 into bf16 and adds that in a second pass. Needs a processor that multiplies
bf16 in tiles (AMX). One thread computes.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import is_for, kernel
from megatron.core.errors import BackendError

SOURCE = Path(__file__).with_suffix(".cpp")
_MULTIPLE = 32
"""What both extents of a weight have to be a multiple of."""

AddWeightGradient = Callable[[Tensor, Tensor, Tensor], None]
"""``(grad, input, sum)``: sum [out, in] fp32 += grad.T @ input, of [num_rows, out] and
[num_rows, in] in bf16."""


def add_weight_gradient(grad: Tensor, input_: Tensor, total: Tensor) -> bool:
    """Add ``grad.T @ input_`` to ``total``, if that can be done in one pass here.

    Args:
        grad: [num_rows, out], of the output of a linear layer.
        input_: [num_rows, in].
        total: [out, in].

    Returns:
        Whether it was done; False where dtypes, shapes, device or ``--cpu-kernels`` ask for torch.
    """
    out, width = total.shape
    can = (
        grad.dtype == input_.dtype == torch.bfloat16
        and total.dtype == torch.float32
        and out % _MULTIPLE == width % _MULTIPLE == 0
        and is_for(grad)
        and is_for(total)
        and torch.get_num_threads() == 1  # torch shares products out over threads
        and all(tensor.stride(1) == 1 for tensor in (grad, input_, total))
    )
    add = kernel("weight gradients in bfloat16", _made) if can else None
    if add is None:
        return False
    add(grad, input_, total)
    return True


def _made() -> AddWeightGradient:
    library = load(SOURCE, options=("-DBF16",), with_torch=True)
    if not library.is_available():
        raise BackendError("this processor has no tiles of bfloat16 (AMX)")
    function = library.add_weight_gradient
    function.argtypes = [*(ctypes.c_void_p, ctypes.c_int64) * 3, *(ctypes.c_int64,) * 3]
    function.restype = None

    def add(grad: Tensor, input_: Tensor, total: Tensor) -> None:
        num_rows, (out, width) = len(grad), total.shape
        assert grad.shape == (num_rows, out), f"{grad.shape=} {total.shape=}"
        assert input_.shape == (num_rows, width), f"{input_.shape=} {total.shape=}"
        places = [x for t in (grad, input_, total) for x in (t.data_ptr(), t.stride(0))]
        function(*places, num_rows, out, width)

    _try_out(add)
    return add


def _try_out(add: AddWeightGradient) -> None:
    """Compare with torch: a compiler that errs must not spoil a run."""
    rng = torch.Generator().manual_seed(1)
    grad = torch.randn(39, 160, generator=rng).bfloat16()
    input_, total = torch.randn(39, 32, generator=rng).bfloat16(), torch.ones(160, 32)
    add(grad, input_, total)
    want = 1.0 + grad.float().t() @ input_.float()
    if not torch.allclose(total, want, rtol=1e-4, atol=1e-3):
        raise BackendError("what the compiler made computes something else than torch")
