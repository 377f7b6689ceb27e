"""What is shown of the curves of ``scaling.py``: the page of tables, and the picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.markdown import made_with, table
from tools.bench.plots import Curve, Panel, plot_curves

Rows = Sequence[dict[str, Any]]

COLUMNS = {
    "value": "",
    "weights_m": "weights, M",
    "gflop": "GFLOP",
    "step_ms": "step, ms",
    "fb_ms": "forward + backward, ms",
    "weights_in_fb_ms": "of it weights in memory, ms",
    "over_weights_ms": "over weights, ms",
    "gflops": "GFLOP/s",
    "gb_per_s": "GB/s over weights",
    "growth": "step / first",
    "expected": "expected",
    "cost": "cost of step",
    "cost_fb": "cost of forward + backward",
    "cost_over_weights": "cost over weights",
}
UNITS = {
    "tokens": "microbatch",
    "layers": "layers",
    "sequence": "tokens of a sample",
    "experts": "experts",
    "experts, 4 microbatches": "experts",
}
TITLES = {
    "tokens": "Tokens: microbatch of 1 to 8 samples, 4 layers",
    "layers": "Layers, at equal tokens",
    "sequence": "Sequence length, at equal tokens, 2 layers",
    "experts": "Experts at equal active size, one microbatch a step, 2 layers",
    "experts, 4 microbatches": "Experts at equal active size, 4 microbatches a step, 2 layers",
}
FEW, MANY, ALLOWED = 8, 64, 1.25
"""Of the aim: so many experts at equal active size may cost so much more than so few."""


def write_page(path: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Write the page to ``path``, and the picture beside it where matplotlib is installed."""
    words = [f"--{name} {getattr(args, key)}" for name, key in (("rounds", "rounds"),)]
    command = " ".join(["tools/bench/scaling.py", *(["--quick"] if args.quick else []), *words])
    picture = path.with_suffix(".png")
    text = [
        "# How the cost of a step grows, on a CPU\n",
        made_with(command)
        + f"\nModels shaped like bench-S: hidden {args.hidden_size}, ffn {2 * args.hidden_size} "
        f"SwiGLU, heads of 64, top-2, vocabulary {args.vocab_size}, samples of {args.seq_length} "
        "tokens, 4 a\nmicrobatch, AdamW, new tokens each step. Processor time; each point in turns "
        "with the first of its curve.\n",
        "*Forward + backward* should grow with the floating-point operations; *over weights* "
        "(zeroing of gradients, norm,\nclipping, AdamW, bf16 copies, and what else a step does) "
        "with the number of weights. *Cost* is growth over expected\ngrowth: 1 is as expected, "
        "below 1 is better. The whole step is expected to take its two parts, each grown so. *Of "
        "it weights in memory*: what\nreading all weights forward and backward and adding to all "
        "gradients, once a microbatch, takes at the rate at which\nthe rest goes over weights; "
        "more experts of equal active size cost that whatever the layer does.\n",
        _experts_verdict(rows),
    ]
    if plot(rows, picture):
        text.append(f"![curves]({picture.name})\n")
    for curve in dict.fromkeys(row["curve"] for row in rows):
        text.append(f"## {TITLES[curve]}\n")
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            found = [r for r in rows if (r["curve"], r["dtype"]) == (curve, dtype)]
            text.append(f"{dtype}:\n\n" + table(found, COLUMNS | {"value": UNITS[curve]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))


def experts_growth(rows: Rows) -> list[dict[str, object]]:
    """Return what ``MANY`` experts cost, over ``FEW`` of equal active size, for each dtype."""
    found: list[dict[str, object]] = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        row: dict[str, object] = {"dtype": dtype}
        for curve, key in (("experts", "one"), ("experts, 4 microbatches", "four")):
            at = {r["value"]: r for r in rows if (r["dtype"], r["curve"]) == (dtype, curve)}
            if FEW in at and MANY in at:
                few, many = at[FEW], at[MANY]
                row[key] = many["growth"] / few["growth"]
                row["fb"] = many["growth_fb"] / few["growth_fb"]
                if key == "one":
                    row["weights"] = many["weights_m"] / few["weights_m"]
                    row["memory"] = 1 + _extra_memory(few, many) / few["step_ms"]
        if len(row) > 1:
            found.append(row)
    return found


def _extra_memory(few: dict[str, Any], many: dict[str, Any]) -> float:
    """Return the milliseconds that the weights of more experts cost in memory alone."""
    keys = ("over_weights_ms", "weights_in_fb_ms")
    return sum(many[key] - few[key] for key in keys)


def _experts_verdict(rows: Rows) -> str:
    columns = {
        "dtype": "dtype",
        "one": "step of one microbatch",
        "four": "step of 4 microbatches",
        "fb": "forward + backward",
        "weights": "weights",
        "memory": "least step of one microbatch, for memory",
    }
    return (
        f"**{FEW} -> {MANY} experts of equal active size** (aim: under {ALLOWED}x), times:\n\n"
        + table(experts_growth(rows), columns)
    )


def plot(rows: Rows, path: Path) -> bool:
    """Draw a panel for each curve; return whether it was drawn."""
    panels = [_panel(rows, curve) for curve in dict.fromkeys(row["curve"] for row in rows)]
    return plot_curves(path, "Growth of a step's processor time", panels)


def _panel(rows: Rows, curve: str) -> Panel:
    curves = []
    of_curve = [row for row in rows if row["curve"] == curve]
    for dtype in dict.fromkeys(row["dtype"] for row in of_curve):
        found = [row for row in of_curve if row["dtype"] == dtype]
        x = [row["value"] for row in found]
        curves.append(Curve(f"{dtype} step", x, [row["growth"] for row in found]))
        curves.append(Curve(f"{dtype} forward + backward", x, [row["growth_fb"] for row in found]))
    x = [row["value"] for row in found]
    work = [row["gflop"] / found[0]["gflop"] for row in found]
    curves.append(Curve("operations", x, work, is_expected=True))
    short = curve if "," in curve else {"sequence": "sequence, equal tokens"}.get(curve, curve)
    grows_much = curve in ("tokens", "layers")
    return Panel(short.capitalize(), UNITS[curve], "times the first", curves, y_is_log=grows_much)
