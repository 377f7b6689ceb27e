"""Cross entropy with the product that makes its logits, forward and backward; the products alone.

Ours never keeps more than one matrix as large as the logits; the others are what torch offers: its
cross entropy on all logits, in their dtype or widened to fp32. Weight gradients go to fp32 sums in
all of them, as in training. Errors are of the loss and of the gradient of hidden states, against
fp64 on a part of the rows.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn import functional

from megatron.core.cpu_kernels.choice import using
from megatron.core.grad_sink import offer_grad_sink
from megatron.core.tensor_parallel.cross_entropy import linear_cross_entropy
from tools.bench.timing import alternate, report

_CHECKED_ROWS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """One size."""

    rows: int
    hidden: int
    vocabulary: int


BENCH_S = Case(2048, 512, 8192)
WIDE = Case(512, 512, 65536)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Sums:
    """A sink: fp32 sums of the weight gradient."""

    def __init__(self, sums: Tensor) -> None:
        self._sums = sums

    def __call__(self) -> Tensor:
        return self._sums

    def put_off(self) -> None:
        raise AssertionError("nothing is put off here")

    def settle(self) -> None:
        raise AssertionError("nothing is put off here")


class Operands:
    """Hidden states, weight, targets, and the sums of the weight gradient."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(case.rows, case.hidden, generator=generator)
        weight = torch.randn(case.vocabulary, case.hidden, generator=generator) * 0.02
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_()
        self.target = torch.randint(case.vocabulary, (case.rows,), generator=generator).to(device)
        self.sums = torch.zeros(case.vocabulary, case.hidden, device=device)
        offer_grad_sink(self.weight, _Sums(self.sums))

    def train(self, loss: Loss) -> None:
        """Forward and backward of the mean; a gradient that is returned is added to the sums."""
        loss(self.hidden, self.weight, self.target).mean().backward()
        if self.weight.grad is not None:
            self.sums.add_(self.weight.grad)
        self.hidden.grad = self.weight.grad = None

    def errors(self, loss: Loss) -> tuple[float, float]:
        """Return the largest error of a loss, and of the gradient over its largest element."""
        found = []
        for wide in (self.hidden.dtype, torch.float64):
            hidden = self.hidden.detach()[:_CHECKED_ROWS].to(wide).requires_grad_()
            weight, target = self.weight.detach().to(wide), self.target[:_CHECKED_ROWS]
            losses = loss(hidden, weight, target)
            (d_hidden,) = torch.autograd.grad(losses.sum(), hidden)
            found.append((losses.detach().double(), d_hidden.double()))
        (ours, d_ours), (exact, d_exact) = found
        relative = (d_ours - d_exact).abs().max() / d_exact.abs().max()
        return (ours - exact).abs().max().item(), relative.item()


def by_torch(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Torch's cross entropy on logits in the dtype of the product."""
    return functional.cross_entropy(functional.linear(hidden, weight), target, reduction="none")


def by_torch_wide(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Torch's cross entropy on logits widened to fp32 (fp64 in fp64)."""
    logits = functional.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(logits.to(wide), target, reduction="none")


def ours_by_torch(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Ours, without compiled kernels."""
    with using("torch"):
        return linear_cross_entropy(hidden, weight, target)


def products(operands: Operands) -> Callable[[], None]:
    """Return what does the three products alone, into memory that is there."""
    hidden, weight = operands.hidden.detach(), operands.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return run


def ways(device: str) -> dict[str, Loss]:
    """Return what is compared."""
    found: dict[str, Loss] = {"ours": linear_cross_entropy}
    if device == "cpu":
        found["ours, torch's kernels"] = ours_by_torch
    return found | {"torch": by_torch, "torch, fp32 softmax": by_torch_wide}


def rows_of(case: Case, name: str, device: str, rounds: int) -> list[dict[str, object]]:
    """Time one size in one dtype."""
    operands = Operands(case, DTYPES[name], device)
    losses = ways(device)
    calls: dict[str, Callable[[], object]] = {
        way: partial(operands.train, loss) for way, loss in losses.items()
    }
    timings = alternate(calls | {"products": products(operands)}, rounds)
    limit = timings["products"].busy
    flops = 6.0 * case.rows * case.hidden * case.vocabulary
    rows = []
    for way, timing in timings.items():
        errors = operands.errors(losses[way]) if way in losses else (None, None)
        rows.append(
            {
                "dtype": name,
                "rows": case.rows,
                "vocabulary": case.vocabulary,
                "way": way,
                "ms": 1e3 * timing.busy,
                "low_ms": 1e3 * timing.low,
                "high_ms": 1e3 * timing.high,
                "gflops": 1e-9 * flops / timing.busy,
                "share_of_limit": limit / timing.busy,
                "loss_error": errors[0],
                "gradient_error": errors[1],
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON file.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed calls of each.")
    parser.add_argument("--rows", type=int, default=None, help="Tokens; with it, one small size.")
    parser.add_argument("--vocab-size", type=int, default=8192, help="Tokens there are; with it.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [BENCH_S, WIDE]
    if args.rows is not None:
        cases = [Case(args.rows, 64, args.vocab_size)]
    rows = [
        row for case in cases for name in DTYPES for row in rows_of(case, name, device, args.rounds)
    ]
    report("cross_entropy", rows, args.output)


if __name__ == "__main__":
    main()
