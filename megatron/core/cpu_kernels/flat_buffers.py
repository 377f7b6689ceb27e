"""What an optimizer step does to flat buffers on a CPU, compiled: each in one pass over memory.

For contiguous fp32. The passes are bound by memory: torch's fused AdamW divides by the clipping
factor through memory, rounds weights in a second pass, and fetches what it only overwrites.
"""

import ctypes
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import is_for, kernel
from megatron.core.errors import BackendError

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-ffp-contract=off",)
"""No fused multiply-add: a step is the same bits on every processor, and waits for memory."""


class AdamWConstants(NamedTuple):
    """What a step of AdamW depends on besides tensors; see ``torch.optim.AdamW``."""

    step: int
    """Number of this step, from 1."""
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    divisor: float = 1.0
    """What gradients are divided by on the way."""


class _Constants(ctypes.Structure):
    """See ``Constants`` in the source."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            *("grad_factor", "kept", "new_share1", "beta2", "new_share2"),
            *("root_factor", "eps", "step_size"),
        )
    ]


class FlatKernels:
    """The compiled functions; for contiguous fp32 tensors of a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take the functions of the compiled source."""
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._adamw, self._fill_zero = library.adamw, library.fill_zero
        self._sum_of_squares = library.sum_of_squares
        self._adamw.argtypes = [*(pointer,) * 5, count, ctypes.POINTER(_Constants)]
        self._fill_zero.argtypes = self._sum_of_squares.argtypes = [pointer, count]
        self._adamw.restype = self._fill_zero.restype = None
        self._sum_of_squares.restype = ctypes.c_double

    def adamw(
        self,
        weight: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        constants: AdamWConstants,
        rounded: Tensor | None = None,
    ) -> None:
        """Step ``weight`` and its moments in place; ``grad`` is only read.

        Args:
            weight: Contiguous fp32, as all others.
            grad: Like ``weight``.
            exp_avg: First moment.
            exp_avg_sq: Second moment.
            constants: Of this step.
            rounded: bf16; becomes the new ``weight``, rounded.
        """
        for tensor in (weight, grad, exp_avg, exp_avg_sq):
            _check(tensor, weight.numel())
        if rounded is not None:
            _check(rounded, weight.numel(), torch.bfloat16)
        self._adamw(
            *(t.data_ptr() for t in (weight, grad, exp_avg, exp_avg_sq)),
            None if rounded is None else rounded.data_ptr(),
            weight.numel(),
            _numbers(constants),
        )

    def sum_of_squares(self, flat: Tensor) -> float:
        """Return the sum of squares, taken in fp64."""
        _check(flat, flat.numel())
        total: float = self._sum_of_squares(flat.data_ptr(), flat.numel())
        return total

    def fill_zero(self, flat: Tensor) -> None:
        """Set ``flat`` to zero without fetching it."""
        _check(flat, flat.numel())
        self._fill_zero(flat.data_ptr(), flat.numel())


def flat_kernels(*flats: Tensor) -> FlatKernels | None:
    """Return the compiled functions if they are to be used for all of ``flats``; else None."""
    fit = all(is_for(x) and x.dtype == torch.float32 and x.is_contiguous() for x in flats)
    return kernel("the step of flat buffers", _compiled) if fit else None


def fill_zero(flat: Tensor) -> None:
    """Set ``flat`` to zero, by whatever is fastest."""
    kernels = flat_kernels(flat)
    if kernels is None:
        flat.zero_()
    else:
        kernels.fill_zero(flat)


def _numbers(c: AdamWConstants) -> _Constants:
    beta1, beta2 = c.betas
    return _Constants(
        grad_factor=1.0 / c.divisor,
        kept=1.0 - c.lr * c.weight_decay,
        new_share1=1.0 - beta1,
        beta2=beta2,
        new_share2=1.0 - beta2,
        root_factor=1.0 / math.sqrt(1.0 - beta2**c.step),
        eps=c.eps,
        step_size=c.lr / (1.0 - beta1**c.step),
    )


def _check(tensor: Tensor, count: int, dtype: torch.dtype = torch.float32) -> None:
    """Stop before C would read or write what it must not."""
    assert tensor.dtype == dtype, f"{tensor.dtype=} is not {dtype}"
    assert tensor.device.type == "cpu", f"{tensor.device=}"
    assert tensor.is_contiguous(), f"{tensor.stride()=}"
    assert tensor.numel() == count, f"{tensor.numel()=} is not {count}"


def _compiled() -> FlatKernels:
    made = FlatKernels(load(SOURCE, options=OPTIONS))
    _try_out(made)
    return made


def _try_out(kernels: FlatKernels) -> None:
    """Step a few numbers as torch does: a compiler that errs must not spoil a run."""
    weight = torch.linspace(-2.0, 2.0, 53)
    grad, rounded = weight.flip(0).square(), torch.empty(53, dtype=torch.bfloat16)
    first, second = torch.zeros(53), torch.zeros(53)
    constants = AdamWConstants(1, 0.1, (0.9, 0.99), 1e-8, 0.1, 2.0)
    plain = weight.double()
    torch._fused_adamw_(  # the class around it would import torch._dynamo
        [plain],
        [grad.double() / 2],
        [torch.zeros_like(plain)],
        [torch.zeros_like(plain)],
        [],
        [torch.ones(())],
        lr=0.1,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
    total = kernels.sum_of_squares(grad)
    kernels.adamw(weight, grad, first, second, constants, rounded)
    kernels.fill_zero(first)
    if not (
        torch.allclose(weight, plain.float(), rtol=1e-5, atol=1e-6)
        and torch.equal(rounded, weight.bfloat16())
        and math.isclose(total, grad.double().square().sum().item(), rel_tol=1e-12)
        and not first.any()
    ):
        raise BackendError("what the C++ compiler made computes something else than torch")
