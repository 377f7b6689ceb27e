"""All SwiGLU experts of a rank in bf16 by one call of C++: no Python and no compiling for each.

Products are torch's own micro-kernels in blocks of fixed shapes, so that nothing is compiled for a
new number of rows, and weight gradients are added to fp32 sums without being rounded. Needs a
processor that multiplies bf16 in tiles (AMX), widths that are multiples of 32, and one thread.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.cpu_kernels.build import load
from megatron.core.cpu_kernels.choice import is_for, kernel
from megatron.core.errors import BackendError
from megatron.core.grad_sink import GradSink, grad_sink_of
from megatron.core.transformer.config.activation import SWIGLU
from megatron.core.transformer.moe.expert_loop import ExpertWeights, looped_experts, queue_of

SOURCE = Path(__file__).with_suffix(".cpp")
_MULTIPLE = 32
"""What hidden size and width of an expert have to be a multiple of."""


def compiled_experts(rows: Tensor, weights: ExpertWeights) -> "CompiledExperts | None":
    """Return what computes SwiGLU experts with these ``weights`` on ``rows``; None for torch."""
    can = (
        rows.dtype == weights.weight1.dtype == torch.bfloat16
        and weights.bias1 is None
        and weights.weight2.shape[1] % _MULTIPLE == weights.weight2.shape[2] % _MULTIPLE == 0
        and is_for(rows)
        and torch.get_num_threads() == 1  # torch shares products out over threads
    )
    return kernel("experts in bfloat16", _made) if can else None


class CompiledExperts:
    """The compiled functions; for contiguous bf16 tensors on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointers = {"forward": 5, "backward": 11, "weight_gradients": 7}
        for name, count in pointers.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p] * count, None
        self._forward, self._backward = library.forward, library.backward
        self._weight_gradients = library.weight_gradients

    def __call__(
        self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor, weights: ExpertWeights
    ) -> Tensor:
        """Compute ``looped_experts`` of SwiGLU experts without biases; the arguments are its."""
        out: Tensor = _Function.apply(rows, probs, *weights[:2], tokens_per_expert, self)
        return out

    def forward(
        self, rows: Tensor, probs: Tensor, sizes: Tensor, weight1: Tensor, weight2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the first matrices give, [num_rows, 2 * ffn], and the output."""
        inner = rows.new_empty(len(rows), weight1.shape[1])
        out = torch.empty_like(rows)
        shape = _Shape.of(rows, sizes, weight1, weight2)
        _check(rows.dtype, rows, weight1, weight2)
        _check(torch.float32, probs)
        assert probs.shape == rows.shape[:1], f"{probs.shape=} {rows.shape=}"
        self._forward(ctypes.addressof(shape), *_places(rows, probs, inner, out))
        return inner, out

    def backward(
        self,
        saved: tuple[Tensor, ...],
        sizes: Tensor,
        grad: Tensor,
        sums: tuple[Tensor, Tensor] | None,
        found: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of rows and probs; add those of weights to ``sums``.

        Args:
            saved: rows, probs, both weights, inner.
            sizes: [num_experts], int64.
            grad: Of the output.
            sums: [num_experts, ...] fp32, of both weights; None to leave in ``found`` what
                ``weight_gradients`` needs.
            found: None or [num_rows, 2 * ffn] and [num_rows, ffn].
        """
        rows, probs, weight1, weight2, inner = saved
        grad_rows, grad_probs = torch.empty_like(rows), torch.empty_like(probs)
        shape = _Shape.of(rows, sizes, weight1, weight2)
        _check(rows.dtype, grad, inner, *(found or ()))
        assert grad.shape == rows.shape, f"{grad.shape=} {rows.shape=}"
        assert (sums is None) != (found is None), "gradients of weights are added or put off"
        _check_sums(sums, (weight1, weight2))
        places = _places(rows, probs, inner, grad, grad_rows, grad_probs)
        ends = [_places(*pair) if pair is not None else (None, None) for pair in (sums, found)]
        self._backward(ctypes.addressof(shape), *places, *ends[0], *ends[1])
        return grad_rows, grad_probs

    def weight_gradients(
        self,
        rows: Tensor,
        grad: Tensor,
        sizes: Tensor,
        found: tuple[Tensor, Tensor],
        sums: tuple[Tensor, Tensor],
    ) -> None:
        """Add the gradients of weights to ``sums``, see ``backward``."""
        shape = _Shape.of(rows, sizes, *sums)
        _check(rows.dtype, rows, grad, *found)
        _check_sums(sums, sums)
        places = _places(rows, grad, *found, *sums)
        self._weight_gradients(ctypes.addressof(shape), *places)


class _Shape(ctypes.Structure):
    """``struct Experts``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_experts", "hidden", "ffn", "num_rows")),
        *((name, ctypes.c_void_p) for name in ("sizes", "weight1", "weight2")),
    )

    @classmethod
    def of(cls, rows: Tensor, sizes: Tensor, weight1: Tensor, weight2: Tensor) -> "_Shape":
        num_experts, hidden, ffn = weight2.shape
        assert weight1.shape == (num_experts, 2 * ffn, hidden), f"{weight1.shape=} {weight2.shape=}"
        assert rows.shape[1] == hidden, f"{rows.shape=} {weight2.shape=}"
        assert sizes.dtype == torch.int64, f"{sizes.dtype=}"
        assert sizes.is_contiguous(), "sizes are read one after another"
        assert len(sizes) == num_experts, f"{sizes.shape=} {num_experts=}"
        assert int(sizes.sum()) == len(rows), f"{sizes=} {rows.shape=}"
        made = cls(num_experts, hidden, ffn, len(rows))
        made.sizes, made.weight1, made.weight2 = _places(sizes, weight1, weight2)
        return made


class _Function(torch.autograd.Function):
    """Keeps rows, and the output of the first matrix, as the loop does."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        probs: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        sizes: Tensor,
        experts: CompiledExperts,
    ) -> Tensor:
        rows, probs, sizes = rows.contiguous(), probs.contiguous(), sizes.contiguous()
        inner, out = experts.forward(rows, probs, sizes, weight1, weight2)
        ctx.sizes, ctx.experts = sizes, experts
        ctx.sinks = [grad_sink_of(weight) for weight in (weight1, weight2)]
        ctx.save_for_backward(rows, probs, weight1, weight2, inner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, sinks, experts = ctx.saved_tensors, ctx.sinks, ctx.experts
        rows, _, weight1, weight2, inner = saved
        grad, later = grad.contiguous(), queue_of(*sinks)
        if later is None:
            totals = _Total(weight1, sinks[0]), _Total(weight2, sinks[1])
            sums = totals[0].sum, totals[1].sum
            made = experts.backward(saved, ctx.sizes, grad, sums, None)
            return (*made, *(total.finished() for total in totals), None, None)
        found = torch.empty_like(inner), inner.new_empty(len(inner), weight2.shape[2])
        made = experts.backward(saved, ctx.sizes, grad, None, found)
        later.put(sinks, _weight_step, experts, rows, grad, ctx.sizes, *found, sinks)
        return (*made, None, None, None, None)


def _weight_step(
    experts: CompiledExperts,
    rows: Tensor,
    grad: Tensor,
    sizes: Tensor,
    inner: Tensor,
    active: Tensor,
    sinks: list[GradSink],
) -> None:
    """Add the gradients of both matrices of all experts, as backward would have done."""
    totals = [_Total(None, sink) for sink in sinks]
    sums = totals[0].sum, totals[1].sum
    experts.weight_gradients(rows, grad, sizes, (inner, active), sums)
    for total in totals:
        total.finished()


class _Total:
    """The fp32 sum of one weight's gradients: its sink's where that is one, else a new one."""

    def __init__(self, weight: Tensor | None, sink: GradSink | None) -> None:
        self._total = weight if sink is None else sink()
        assert self._total is not None, "a gradient without a sink is shaped like its weight"
        self._returns = sink is None
        self._adds_to_it = not self._returns and self._total.dtype == torch.float32
        self.sum = self._total
        if not self._adds_to_it:
            self.sum = torch.zeros_like(self._total, dtype=torch.float32)

    def finished(self) -> Tensor | None:
        """Return what autograd is to be given."""
        assert self._total is not None, "it has been made"
        if self._returns:
            return self.sum.to(self._total.dtype)
        if not self._adds_to_it:
            self._total.add_(self.sum)
        return None


def _check(dtype: torch.dtype, *tensors: Tensor) -> None:
    """Stop before C would read or write what it must not."""
    for tensor in tensors:
        assert tensor.dtype == dtype, f"{tensor.dtype=} is not {dtype}"
        assert tensor.is_contiguous(), f"{tensor.stride()=}"
        assert tensor.device.type == "cpu", f"{tensor.device=}"


def _check_sums(sums: tuple[Tensor, Tensor] | None, weights: tuple[Tensor, Tensor]) -> None:
    for total, weight in zip(sums or (), weights, strict=False):
        assert total.shape == weight.shape, f"{total.shape=} {weight.shape=}"
        _check(torch.float32, total)


def _places(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _made() -> CompiledExperts:
    library = load(SOURCE, options=("-DBF16",), with_torch=True)
    if not library.is_available():
        raise BackendError("this processor has no tiles of bfloat16 (AMX)")
    made = CompiledExperts(library)
    _try_out(made)
    return made


def _try_out(made: CompiledExperts) -> None:
    """Compute a few rows and compare with torch: a compiler that errs must not spoil a run."""
    sizes, hidden, ffn = torch.tensor([5, 0, 35]), 32, 160
    rng = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).bfloat16()

    rows, grad, probs = some(40, hidden), some(40, hidden), torch.linspace(0.1, 1.0, 40)
    weights = ExpertWeights(some(3, 2 * ffn, hidden), some(3, hidden, ffn), None, None)
    results = []
    for compute in (
        lambda x, p, w: looped_experts(x, sizes, p, w, kind=SWIGLU),
        lambda x, p, w: made(x, sizes, p, w),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in (rows, probs, *weights[:2])]
        with torch.enable_grad():
            own = ExpertWeights(leaves[2], leaves[3], None, None)
            out = compute(leaves[0], leaves[1], own)
            results.append([out.detach(), *torch.autograd.grad((out * grad).sum(), leaves)])
    for want, got in zip(*results, strict=True):
        error = (got.float() - want.float()).norm() / want.float().norm()
        if not error < 0.02:
            raise BackendError("what the compiler made computes something else than torch")
