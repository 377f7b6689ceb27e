"""The matrix products that a step of bench-S cannot do without, at their own shapes and alone.

Done in the order of the step, each over operands of its own, so that they are as far from the
cache as in the step; and the best of them again and again over the same operands: the peak.
Rows of experts are even. Weight gradients are added to fp32 sums in fp32, where that is free, and
only made in bf16.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from megatron.core.transformer.transformer_config import TransformerConfig
from tools.bench.step_ours import Size
from tools.bench.timing import alternate, busy_clock


class Linear(NamedTuple):
    """One linear map of a step: what multiplies, how often, and with how many rows."""

    name: str
    rows: int
    inner: int
    columns: int
    count: int
    """How many there are in a step, of one layer."""
    layers: int

    @property
    def flops(self) -> float:
        """Of one product: forward, or one of the two of backward."""
        return 2.0 * self.rows * self.inner * self.columns


def linears(config: TransformerConfig, size: Size) -> list[Linear]:
    """Return all linear maps of a step, routers left out: they are in a row of their own."""
    hidden, tokens, layers = config.hidden_size, size.tokens, config.num_layers
    ffn, experts = config.moe_ffn_size, config.num_moe_experts or 1
    rows = tokens * config.moe_router_topk // experts
    return [
        Linear("qkv", tokens, hidden, 3 * hidden, 1, layers),
        Linear("projection", tokens, hidden, hidden, 1, layers),
        Linear("expert fc1", rows, hidden, 2 * ffn, experts, layers),
        Linear("expert fc2", rows, ffn, hidden, experts, layers),
        Linear("output layer", tokens, hidden, size.vocabulary, 1, 1),
    ]


class _Operands:
    """Tensors of one use of a linear map."""

    def __init__(self, linear: Linear, dtype: torch.dtype, device: str) -> None:
        kind = {"dtype": dtype, "device": device}
        self.weight = torch.randn(linear.columns, linear.inner, **kind)
        self.x, self.dx = (torch.randn(linear.rows, linear.inner, **kind) for _ in range(2))
        self.y, self.dy = (torch.randn(linear.rows, linear.columns, **kind) for _ in range(2))
        self.sums = torch.zeros_like(self.weight)

    def forward(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.y)

    def input_gradient(self) -> None:
        torch.mm(self.dy, self.weight, out=self.dx)

    def weight_gradient(self) -> None:
        if self.sums.dtype == torch.float32:
            self.sums.addmm_(self.dy.t(), self.x)
        else:
            torch.mm(self.dy.t(), self.x, out=self.sums)

    def ways(self) -> dict[str, Callable[[], None]]:
        return {
            "forward": self.forward,
            "input gradient": self.input_gradient,
            "weight gradient": self.weight_gradient,
        }


class ProductTimes(NamedTuple):
    """What the products of a step take."""

    peak_gflops: float
    """The best rate that any of them reaches over operands that stay where they are."""
    peak_of: str
    """Which it is."""
    flops: float
    seconds: dict[str, float]
    """Linear map and direction -> seconds of all of them in a step, over operands of their own."""
    flops_of: dict[str, float]


def time_products(
    config: TransformerConfig, size: Size, dtype: torch.dtype, device: str, rounds: int
) -> ProductTimes:
    """Measure; takes the memory of weights, gradients and operands of a step."""
    found = linears(config, size)
    peak, peak_of = 0.0, ""
    for linear in found:
        operands = _Operands(linear, dtype, device)
        for way, timing in alternate(operands.ways(), rounds, warm_up=2).items():
            rate = 1e-9 * linear.flops / timing.busy
            if rate > peak:
                peak, peak_of = rate, f"{linear.name}, {way}"
    seconds = _cold(found, dtype, device, rounds)
    flops_of = {
        f"{one.name}, {way}": one.flops * one.count * one.layers
        for one in found
        for way in ("forward", "input gradient", "weight gradient")
    }
    return ProductTimes(peak, peak_of, sum(flops_of.values()), seconds, flops_of)


def _cold(found: list[Linear], dtype: torch.dtype, device: str, rounds: int) -> dict[str, float]:
    step = [(linear.name, _Operands(linear, dtype, device)) for linear in _in_order(found)]
    turns: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        spent: dict[str, float] = {}
        for name, operands in step:
            _add(spent, f"{name}, forward", operands.forward)
        for name, operands in reversed(step):
            _add(spent, f"{name}, input gradient", operands.input_gradient)
            _add(spent, f"{name}, weight gradient", operands.weight_gradient)
        if turn:
            for key, value in spent.items():
                turns.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in turns.items()}


def _in_order(found: list[Linear]) -> Iterator[Linear]:
    for _ in range(max(linear.layers for linear in found)):
        for linear in found:
            if linear.layers > 1:
                yield from [linear] * linear.count
    yield from (linear for linear in found if linear.layers == 1)


def _add(spent: dict[str, float], key: str, call: Callable[[], None]) -> None:
    start = busy_clock()
    call()
    spent[key] = spent.get(key, 0.0) + busy_clock() - start
