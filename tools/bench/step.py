"""Training steps of bench-S: ours, what others would use instead, and what the machine allows.

All contenders start from the same weights and take turns, step by step, on the same new tokens;
before the first step their losses must agree. Then the parts of a step are measured alone, and the
memory of a step in a process of its own for each contender. On one thread of a CPU, the default,
all times are processor time. ``--markdown FILE`` writes the page.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tools.bench import roofline
from tools.bench.step_memory import memory_rows
from tools.bench.step_ours import (
    Data,
    Size,
    Step,
    add_size_options,
    bench_s,
    gemm_flops,
    size_of,
)
from tools.bench.step_page import write_page
from tools.bench.step_peers import CONTENDERS, PeerStep, make_peers, missing
from tools.bench.timing import Timing, alternate, report
from tools.bench.world import world_of_one

__all__ = ["Size", "Step", "add_size_options", "bench_s", "gemm_flops", "size_of"]

DTYPES = ("fp32", "bf16")
PARTS = ("steps", "roofline", "memory")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
"""How far losses at equal weights may be apart, of their size."""


def time_steps(args: argparse.Namespace, dtype: str, device: str) -> list[dict[str, object]]:
    """Return a row for each contender, and one for each limit of the machine."""
    size, data = size_of(args), Data(size_of(args))
    config = bench_s(size.hidden, bf16=dtype == "bf16")
    ours = Step(config, size, device, data)
    wanted = args.contenders if "steps" in args.parts else ["ours"]
    contenders: list[Step | PeerStep] = [ours, *make_peers(wanted, ours, data)]
    losses = {one.name: one.forward_loss() for one in contenders}
    refuse_other_work(contenders, losses, dtype)
    calls = {one.name: one for one in contenders}
    timings = alternate(calls, args.rounds, before=data.draw, warm_up=args.warm_up)
    sizes = {one.name: one.num_parameters for one in contenders}
    del contenders, calls
    gc.collect()
    flops = gemm_flops(config, size)
    rows = [
        _row(dtype, name, timings[name], size, flops)
        | {
            "parameters": sizes[name],
            "loss": losses[name],
            "ours_faster": timings[name].busy / timings["ours"].busy,
        }
        for name in timings
    ]
    if "roofline" in args.parts:
        args.rooflines[dtype] = roofline.measure(ours, device, args.rounds)
        for row in rows:
            row |= _shares(row, args.rooflines[dtype])
    return rows


def refuse_other_work(
    contenders: Sequence[Step | PeerStep], losses: dict[str, float], dtype: str
) -> None:
    """Stop when somebody computes something else: another size, or another loss."""
    counts = {one.name: one.num_parameters for one in contenders}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"contenders have different numbers of parameters: {counts}")
    middle = statistics.median(losses.values())
    if any(abs(loss - middle) > TOLERANCE[dtype] * middle for loss in losses.values()):
        raise SystemExit(f"losses at equal weights disagree in {dtype}: {losses}")
    print(f"{dtype}: {counts['ours']:,} parameters each; losses at equal weights:")
    print("  " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))


def _row(dtype: str, name: str, timing: Timing, size: Size, flops: float) -> dict[str, object]:
    low, high = timing.spread
    return {
        "dtype": dtype,
        "what": name,
        "step_ms": 1e3 * timing.busy,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "wall_ms": 1e3 * timing.median,
        "tokens_per_s": size.tokens / timing.busy,
        "gflops": 1e-9 * flops / timing.busy,
    }


def _shares(row: dict[str, Any], limits: roofline.Roofline) -> dict[str, object]:
    seconds = 1e-3 * row["step_ms"]
    return {
        "share_of_peak": limits.peak / seconds,
        "share_of_own_shape": limits.own_shape / seconds,
        "share_of_known": limits.known / seconds,
    }


def roofline_rows(rooflines: dict[str, roofline.Roofline]) -> list[dict[str, object]]:
    """Return the parts of a step as rows, with their sums."""
    rows: list[dict[str, object]] = []
    for dtype, limits in rooflines.items():
        for part in limits.rows:
            rows.append(
                {
                    "dtype": dtype,
                    "part": part.part,
                    "work": part.work,
                    "peak_ms": 1e3 * part.peak,
                    "own_shape_ms": 1e3 * part.own_shape,
                    "known_ms": 1e3 * (part.own_shape if part.known is None else part.known),
                    "known_as": part.known_as,
                }
            )
        rows.append(
            {
                "dtype": dtype,
                "part": "sum",
                "work": f"copy {limits.copy_gb_per_s:.1f} GB/s",
                "peak_ms": 1e3 * limits.peak,
                "own_shape_ms": 1e3 * limits.own_shape,
                "known_ms": 1e3 * limits.known,
                "known_as": f"peak {limits.products.peak_gflops:.0f} GFLOP/s "
                f"({limits.products.peak_of})",
            }
        )
    return rows


def product_rows(rooflines: dict[str, roofline.Roofline]) -> list[dict[str, object]]:
    """Return what each kind of product takes at its own shape."""
    return [
        {
            "dtype": dtype,
            "product": name,
            "ms": 1e3 * seconds,
            "gflops": 1e-9 * limits.products.flops_of[name] / seconds,
        }
        for dtype, limits in rooflines.items()
        for name, seconds in limits.products.seconds.items()
    ]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON files.")
    parser.add_argument("--markdown", type=Path, default=None, help="Page to write.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed steps of each.")
    parser.add_argument("--warm-up", type=int, default=2, help="Untimed steps of each before.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="Who takes part."
    )
    parser.add_argument("--threads", type=int, default=1, help="Of the CPU; 1: processor time.")
    add_size_options(parser)
    return parser.parse_args(words)


def main() -> None:
    """Print the tables."""
    args = parse()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, why in missing().items():
        if name in args.contenders:
            print(f"{name} is left out: {why}")
    args.rooflines = {}
    rows: list[dict[str, object]] = []
    with world_of_one():
        for dtype in args.dtypes:
            if {"steps", "roofline"} & set(args.parts):
                rows += time_steps(args, dtype, device)
                gc.collect()
    tables = {
        "step": rows,
        "step_roofline": roofline_rows(args.rooflines),
        "step_products": product_rows(args.rooflines),
        "step_memory": memory_rows(args, device) if "memory" in args.parts else [],
    }
    for name, table in tables.items():
        if table:
            report(name, table, args.output)
    if args.markdown is not None:
        write_page(args.markdown, tables)


if __name__ == "__main__":
    main()
