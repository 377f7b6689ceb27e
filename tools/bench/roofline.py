"""What a step of bench-S costs at least on this machine: the sum of its parts, each alone.

Two limits. *Peak*: matrix products at the best rate that any of them reaches, everything else as
bytes through memory. *Own shape*: each product at its own shape over operands as far from the cache
as in the step, attention by the fastest way we know, everything else still as bytes. Beside them
what the fastest code we know takes for the parts that are no products: where work is left.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from megatron.core.transformer.transformer_config import TransformerConfig
from tools.bench.roofline_parts import SOFTMAX, Parts
from tools.bench.roofline_products import ProductTimes, time_products
from tools.bench.step_ours import Size, Step
from tools.bench.timing import alternate, busy_clock

_MIB = 1 << 20
ACTIVATION = "SwiGLU x probability"


class Row(NamedTuple):
    """One part of a step, in seconds."""

    part: str
    work: str
    """GFLOP or MiB."""
    peak: float
    own_shape: float
    known: float | None
    """Of the fastest code we know; None where the measured one is the limit itself."""
    known_as: str


class Roofline(NamedTuple):
    """All parts of a step of one dtype."""

    rows: list[Row]
    products: ProductTimes
    copy_gb_per_s: float
    """Bytes read and written by a copy."""

    @property
    def peak(self) -> float:
        """Seconds of a step, see the module."""
        return sum(row.peak for row in self.rows)

    @property
    def own_shape(self) -> float:
        """Seconds of a step, see the module."""
        return sum(row.own_shape for row in self.rows)

    @property
    def known(self) -> float:
        """Seconds of a step that is no more than its parts as we know them."""
        return sum(row.own_shape if row.known is None else row.known for row in self.rows)


def measure(step: Step, device: str, rounds: int) -> Roofline:
    """Measure all parts, those that are code with the modules of ``step``."""
    config, size = step.run.config.model, step.size
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    products = time_products(config, size, dtype, device, rounds)
    bandwidth = copy_rate(device)
    parts = Parts(step, device)
    rows = [
        *_products(products, _fastest({"ours": parts.experts()}, 5)[1], config, size, bandwidth)
    ]
    attention = _fastest(parts.attention(), 5)
    rows.append(_attention(config, size, products.peak_gflops, bandwidth, attention))
    ways: dict[str, dict[str, Callable[[], object]]] = parts.by_row()
    head = sum(products.seconds[key] for key in products.seconds if key.startswith("output layer"))
    loss = _fastest({"ours": parts.loss()}, 5)[1] - head
    for part, size_bytes in bytes_of_parts(config, size).items():
        name, seconds = _fastest(ways[part], 5)
        at_memory_rate = size_bytes / bandwidth
        if part == SOFTMAX and loss < seconds:  # a difference, which noise may make too small
            name, seconds = "our output layer, less its products", max(loss, at_memory_rate)
        least = min(at_memory_rate, seconds)
        note = name if seconds >= at_memory_rate else f"{name}, faster than a copy"
        rows.append(Row(part, f"{size_bytes / _MIB:.0f} MiB", least, least, seconds, note))
    return Roofline(rows, products, 1e-9 * bandwidth)


def _products(
    products: ProductTimes,
    experts: float,
    config: TransformerConfig,
    size: Size,
    bandwidth: float,
) -> Iterator[Row]:
    """Yield the rows of products: dense ones, and those of experts.

    Args:
        products: As measured with torch.
        experts: Seconds that all of the experts' work takes our layers, products and activation.
        config: Of the model.
        size: Of the batch.
        bandwidth: Of a copy.
    """
    activation = bytes_of_parts(config, size)[ACTIVATION] / bandwidth
    for name, is_expert in (("dense products", False), ("expert products", True)):
        mine = [key for key in products.seconds if key.startswith("expert") == is_expert]
        flops = sum(products.flops_of[key] for key in mine)
        seconds, by = sum(products.seconds[key] for key in mine), "torch"
        if is_expert and experts - activation < seconds:
            seconds, by = experts - activation, "our experts, less the activation's bytes"
        at_peak = min(1e-9 * flops / products.peak_gflops, seconds)
        yield Row(name, f"{1e-9 * flops:.0f} GFLOP", at_peak, seconds, None, by)


def _attention(
    config: TransformerConfig,
    size: Size,
    peak: float,
    bandwidth: float,
    measured: tuple[str, float],
) -> Row:
    """Products of the causal half, forward and twice in backward, and what goes through memory.

    That is: weights once each way; queries and keys in and out of their rotation, both ways.
    """
    flops = 6.0 * config.num_layers * size.tokens * size.sequence * config.hidden_size
    weights = size.microbatch * config.num_attention_heads * size.sequence**2 / 2
    moved = 2 * weights + 8 * size.tokens * config.hidden_size
    seconds = 1e-9 * flops / peak + moved * _item(config) * config.num_layers / bandwidth
    name, known = measured
    return Row(
        "attention, rotation", f"{1e-9 * flops:.0f} GFLOP", min(seconds, known), known, None, name
    )


def _item(config: TransformerConfig) -> int:
    return 2 if config.bf16 else 4


def bytes_of_parts(config: TransformerConfig, size: Size) -> dict[str, float]:
    """Return what each part that is no product reads and writes, forward and backward, in bytes.

    Every tensor once each way, as if each part were one pass; parts of a layer for all layers.
    """
    tokens, hidden, item = size.tokens, config.hidden_size, _item(config)
    topk, ffn, layers = config.moe_router_topk, config.moe_ffn_size, config.num_layers
    experts = config.num_moe_experts or 1
    stream = tokens * hidden * item  # one tensor of the residual stream
    inner = tokens * topk * ffn * item
    params = (
        2 * size.vocabulary * hidden
        + layers * (4 * hidden**2 + experts * (3 * hidden * ffn + hidden) + 2 * hidden)
        + hidden
    )
    return {
        # logits in, their gradient out
        SOFTMAX: 2.0 * tokens * size.vocabulary * item,
        # forward: gate and up in, product out; backward: both and the gradient in, two out
        ACTIVATION: 8.0 * inner * layers,
        # norm and sum in one pass: 4 forward, 4 backward, twice a layer
        "norms, residual": stream * (layers * 16.0 + 5.0),
        # gate reads tokens forward and backward and adds to their gradient; rows out and in again
        "router, permute, unpermute": stream * layers * (3.0 + 4.0 * (1 + topk)),
        # zero 4, norm 4, AdamW 16 in and 12 out; bf16 weights out
        "AdamW, norm, zero, copies": params * (36.0 + (2.0 if config.bf16 else 0.0)),
    }


def copy_rate(device: str) -> float:
    """Return bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(256 * _MIB, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(7):
        start = busy_clock()
        target.copy_(source)
        seconds.append(busy_clock() - start)
    return 2.0 * source.numel() / statistics.median(seconds)


def _fastest(ways: dict[str, Callable[[], object]], rounds: int) -> tuple[str, float]:
    """Return the name and seconds of the fastest way to do a part."""
    timings = alternate(ways, rounds, warm_up=2)
    name = min(timings, key=lambda one: timings[one].busy)
    return name, timings[name].busy
