"""How the cost of a step grows: with tokens, layers, sequence length, and experts.

Models shaped like bench-S but small. Each point takes turns with the first of its curve, step by
step on new tokens, so that a ratio is of one moment. The step is split in two, for they must grow
differently: forward and backward with the floating-point operations, and what goes over all
weights once a step (zeroing of gradients, norm, AdamW) with the number of weights. A cost of 1 is
growth as expected. ``--markdown FILE`` writes the page and its picture.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.training.throughput import flops_per_token
from tools.bench.scaling_page import plot, write_page
from tools.bench.timed_run import TimedRun, options_of
from tools.bench.timing import report
from tools.bench.world import world_of_one

CURVES = ("tokens", "layers", "sequence", "experts", "experts, 4 microbatches")
VALUES: dict[str, Sequence[int]] = {
    "tokens": (1, 2, 4, 8),
    "layers": (2, 4, 8, 16),
    "sequence": (256, 512, 1024, 2048, 4096),
    "experts": (8, 16, 32, 64, 128, 256),
}
QUICK: dict[str, Sequence[int]] = {
    "tokens": (1, 4),
    "layers": (2, 4),
    "sequence": (256, 1024),
    "experts": (8, 64),
}
DTYPES = ("fp32", "bf16")
BYTES_OF_A_WEIGHT = {"fp32": 4 + 4 + 28, "bf16": 4 + 4 + 28 + 6}
"""Read and written once a step: zeroed gradient; read for the norm; AdamW reads weight, gradient
and two moments and writes all but the gradient; bf16 weights are rounded from fp32 ones."""
BYTES_IN_A_MICROBATCH = {"fp32": 4 + 4 + 8, "bf16": 2 + 2 + 8}
"""Of a weight, read forward and backward; its gradient is added to a sum in fp32."""


class Point(NamedTuple):
    """One model and batch."""

    value: int
    """What the curve varies; tokens are told by the microbatch."""
    layers: int
    experts: int
    sequence: int
    samples: int
    """Of a microbatch."""
    microbatches: int


class Measured(NamedTuple):
    """A point beside the first one of its curve."""

    point: Point
    seconds: dict[str, float]
    """Medians of ``step``, ``fb`` (forward and backward) and ``weights`` (all else)."""
    growth: dict[str, float]
    """Medians over rounds of the ratios to the first point, same keys."""
    flops: float
    parameters: int


def points(curve: str, values: Sequence[int], *, sequence: int) -> list[Point]:
    """Return the points of ``curve``; ``sequence`` is that of all but the curve of sequences."""
    if curve == "tokens":
        return [Point(n, 4, 8, sequence, n, 1) for n in values]
    if curve == "layers":
        return [Point(n, n, 8, sequence, 4, 1) for n in values]
    if curve == "sequence":
        return [Point(n, 2, 8, n, max(values) // n, 1) for n in values]
    microbatches = 4 if curve.endswith("microbatches") else 1
    return [Point(n, 2, n, sequence, 4, microbatches) for n in values]


def build(point: Point, dtype: str, args: argparse.Namespace) -> TimedRun:
    """Make the run of a point."""
    options: dict[str, Any] = options_of(
        hidden=args.hidden_size,
        layers=point.layers,
        sequence=point.sequence,
        experts=point.experts,
        vocabulary=args.vocab_size,
        bf16=dtype == "bf16",
    )
    options["micro_batch_size"] = point.samples
    options["global_batch_size"] = point.samples * point.microbatches
    return TimedRun(options)


def flops_of(run: TimedRun) -> float:
    """Return the floating-point operations of a step, router included."""
    model = run.config.model
    one = flops_per_token(
        model, seq_length=run.run.seq_length, vocab_size=run.run.padded_vocab_size
    )
    assert model.num_moe_experts is not None, "every layer has experts"
    router = 6.0 * model.num_layers * model.hidden_size * model.num_moe_experts
    return (one + router) * run.run.seq_length * run.run.global_batch_size


def two_parts(seconds: dict[str, float]) -> dict[str, float]:
    """Split a step into what grows with operations and what grows with weights."""
    fb = seconds["forward_backward"]
    return {"step": seconds["step"], "fb": fb, "weights": seconds["step"] - fb}


def measure(
    curve_points: Sequence[Point], dtype: str, args: argparse.Namespace
) -> Iterator[Measured]:
    """Yield every point, timed in turns with the first, which comes first."""
    first = build(curve_points[0], dtype, args)
    for point in curve_points:
        other = first if point == curve_points[0] else build(point, dtype, args)
        rounds = []
        for turn in range(args.warm_up + args.rounds):
            pair = (two_parts(first.step()), two_parts(other.step()))
            if turn >= args.warm_up:
                rounds.append(pair)
        keys = rounds[0][0]
        growth = {k: statistics.median(new[k] / old[k] for old, new in rounds) for k in keys}
        yield Measured(
            point,
            {k: statistics.median(new[k] for _, new in rounds) for k in keys},
            dict.fromkeys(keys, 1.0) if other is first else growth,
            flops_of(other),
            other.num_parameters,
        )
        del other
        gc.collect()


def row_of(curve: str, dtype: str, first: Measured, found: Measured) -> dict[str, object]:
    """Return the figures of a point; costs are growth over expected growth, 1 for the first.

    The whole step is expected to take what its two parts took at the first point, each grown as
    expected.
    """
    work = found.flops / first.flops
    weights = found.parameters / first.parameters
    share = first.seconds["fb"] / first.seconds["step"]
    expected = share * work + (1 - share) * weights
    rate = BYTES_OF_A_WEIGHT[dtype] * found.parameters / found.seconds["weights"]
    in_fb = BYTES_IN_A_MICROBATCH[dtype] * found.parameters * found.point.microbatches
    return {
        "curve": curve,
        "dtype": dtype,
        "value": found.point.value,
        "weights_m": 1e-6 * found.parameters,
        "gflop": 1e-9 * found.flops,
        "step_ms": 1e3 * found.seconds["step"],
        "fb_ms": 1e3 * found.seconds["fb"],
        "over_weights_ms": 1e3 * found.seconds["weights"],
        "gflops": 1e-9 * found.flops / found.seconds["fb"],
        "gb_per_s": 1e-9 * rate,
        "weights_in_fb_ms": 1e3 * in_fb / rate,
        "growth": found.growth["step"],
        "growth_fb": found.growth["fb"],
        "expected": expected,
        "cost": found.growth["step"] / expected,
        "cost_fb": found.growth["fb"] / work,
        "cost_over_weights": found.growth["weights"] / weights,
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="Two points a curve.")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=CURVES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--hidden-size", type=int, default=256, help="Width of a token.")
    parser.add_argument("--vocab-size", type=int, default=2048, help="Tokens there are.")
    parser.add_argument("--seq-length", type=int, default=512, help="Tokens of a sample.")
    parser.add_argument("--experts", type=int, nargs="+", help="Points of the expert curves.")
    parser.add_argument("--sequences", type=int, nargs="+", help="Points of that curve.")
    parser.add_argument("--rounds", type=int, default=3, help="Timed pairs of steps.")
    parser.add_argument("--warm-up", type=int, default=2, help="Untimed pairs before.")
    parser.add_argument("--output", type=Path, help="Folder for scaling.json and scaling.png.")
    parser.add_argument("--markdown", type=Path, help="Page to write, a picture beside it.")
    return parser.parse_args(words)


def main() -> None:
    """Measure all curves and print the table."""
    args = parse()
    torch.set_num_threads(1)  # one core is what a rank has, and what processor time measures
    chosen = dict(QUICK if args.quick else VALUES)
    chosen |= {"experts": args.experts} if args.experts else {}
    chosen |= {"sequence": args.sequences} if args.sequences else {}
    rows: list[dict[str, object]] = []
    with world_of_one():
        for dtype in args.dtypes:
            for curve in args.curves:
                values = sorted(chosen[curve.split(",")[0]])
                curve_points = points(curve, values, sequence=args.seq_length)
                found = list(measure(curve_points, dtype, args))
                rows += [row_of(curve, dtype, found[0], one) for one in found]
                gc.collect()
    report("scaling", rows, args.output)
    if args.output is not None:
        plot(rows, args.output / "scaling.png")
    if args.markdown is not None:
        write_page(args.markdown, rows, args)


if __name__ == "__main__":
    main()
