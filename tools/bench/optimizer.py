"""What follows backward: norm of the gradient, clipping, AdamW, weights in bf16, gradients to zero.

Ours on flat buffers against torch's ways on one tensor for each parameter, whose gradients are
clipped by ``clip_grad_norm_``; one after the other, since only one of them fits into memory. The
limit is the memory that must be moved, at the rate at which this machine copies: gradients are
read twice and zeroed, weights and both moments read and written, bf16 weights written.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from megatron.core.cpu_kernels.choice import using
from megatron.core.cpu_kernels.flat_buffers import fill_zero
from megatron.core.optimizer.clip_grads import sum_of_squares
from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from tools.bench.timing import alternate, report

MODEL = (512, 1024)
"""Shape of a parameter."""
PARAMETERS = 120
"""63 million numbers, as bench-S has."""
CLIP = 1.0
_TORCH: dict[str, dict[str, Any]] = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch for-loop": {"foreach": False},
}


def gradient(count: int, device: str) -> Tensor:
    """Return ``count`` small numbers of norm above ``CLIP``."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)


class Ours:
    """The flat step, as ``MegatronOptimizer`` takes it."""

    def __init__(self, count: int, device: str, *, bf16: bool, choice: str) -> None:
        self._choice = choice
        self._main = torch.zeros(count, device=device)
        self._main.grad = self._gradient = gradient(count, device)
        self._model = torch.zeros(count if bf16 else 0, dtype=torch.bfloat16, device=device)
        rounded = {self._main: self._model} if bf16 else {}
        config = OptimizerConfig(lr=3e-4, clip_grad=CLIP)
        with using(choice):  # type: ignore[arg-type]
            group = {"params": [self._main], "weight_decay": 0.01}
            self._step = FlatStep(config, [group], rounded)

    def __call__(self) -> None:
        """Norm, step, rounding, zero."""
        with using(self._choice):  # type: ignore[arg-type]
            self._step.step(sum_of_squares(self._gradient).sqrt())
            if len(self._model) and not self._step.rounds(self._main):
                self._model.copy_(self._main)
            fill_zero(self._gradient)


class Torchs:
    """``torch.optim.AdamW`` over parameters of their own."""

    def __init__(self, number: int, device: str, *, bf16: bool, options: dict[str, Any]) -> None:
        count = MODEL[0] * MODEL[1]
        self._params = [torch.zeros(MODEL, device=device).requires_grad_() for _ in range(number)]
        for param in self._params:
            param.grad = gradient(count, device).view(MODEL)
        self._model = [p.detach().bfloat16() for p in self._params] if bf16 else []
        self._step = torch.optim.AdamW(self._params, lr=3e-4, weight_decay=0.01, **options)

    def __call__(self) -> None:
        """Norm, clipping, step, rounding, zero."""
        torch.nn.utils.clip_grad_norm_(self._params, CLIP)
        self._step.step()
        with torch.no_grad():
            for weights, param in zip(self._model, self._params, strict=bool(self._model)):
                weights.copy_(param)
        self._step.zero_grad(set_to_none=False)


def copy_bytes_per_s(count: int, device: str, rounds: int) -> float:
    """Measure a copy of ``count`` fp32 numbers: bytes read and written in a second."""
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    timing = alternate({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 8.0 * count / timing.busy


def contenders(
    number: int, device: str, *, bf16: bool
) -> dict[str, Callable[[], Callable[[], None]]]:
    """Return what makes each way; one at a time is in memory."""
    count = number * MODEL[0] * MODEL[1]
    found: dict[str, Callable[[], Callable[[], None]]] = {
        "ours": partial(Ours, count, device, bf16=bf16, choice="auto")
    }
    if device == "cpu":
        found["ours, torch's kernels"] = partial(Ours, count, device, bf16=bf16, choice="torch")
    for name, options in _TORCH.items():
        found[name] = partial(Torchs, number, device, bf16=bf16, options=options)
    return found


def rows_of(number: int, device: str, rounds: int, *, bf16: bool) -> list[dict[str, object]]:
    """Time all ways, and the copy before and after them."""
    count = number * MODEL[0] * MODEL[1]
    moved = count * (4.0 * (2 + 1 + 6) + 2.0 * bf16)
    rates = [copy_bytes_per_s(count, device, rounds)]
    timings = {}
    for name, make in contenders(number, device, bf16=bf16).items():
        timings[name] = alternate({name: make()}, rounds)[name]
    rates.append(copy_bytes_per_s(count, device, rounds))
    limit = moved / max(rates)
    rows: list[dict[str, object]] = [
        {
            "dtype": "bf16" if bf16 else "fp32",
            "parameters": count,
            "way": name,
            "ms": 1e3 * timing.busy,
            "low_ms": 1e3 * timing.low,
            "high_ms": 1e3 * timing.high,
            "gb_per_s": 1e-9 * moved / timing.busy,
            "share_of_limit": limit / timing.busy,
        }
        for name, timing in timings.items()
    ]
    memory = {"way": "memory alone", "ms": 1e3 * limit, "gb_per_s": 1e-9 * max(rates)}
    return [*rows, {**rows[0], "low_ms": None, "high_ms": None, "share_of_limit": 1.0, **memory}]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON file.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed steps of each.")
    parser.add_argument(
        "--parameters", type=int, default=PARAMETERS, help="Matrices of 512 x 1024."
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        row
        for bf16 in (False, True)
        for row in rows_of(args.parameters, device, args.rounds, bf16=bf16)
    ]
    report("optimizer", rows, args.output)


if __name__ == "__main__":
    main()
