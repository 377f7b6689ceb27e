"""What is shown of ``two_ranks.py``: the page of tables, and the picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.markdown import made_with, table
from tools.bench.plots import Bar, BarPanel, plot_bars

Rows = Sequence[dict[str, Any]]

COLUMNS = {
    "name": "",
    "scaling": "scaling",
    "one_rank_ms": "one rank, ms",
    "step_ms": "two ranks, ms",
    "efficiency": "efficiency",
    "extra": "extra",
    "transfer": "transfer",
    "waiting": "waiting",
    "bubble": "least idle",
    "over_weights": "over weights",
    "gloo_threads": "gloo's threads",
    "calls": "calls",
    "mib": "MiB",
}
NAMES = {
    "alone": "two runs, nothing shared",
    "ep2": "EP 2",
    "dp2": "DP 2",
    "dp2-sharded": "DP 2, distributed optimizer",
    "tp2": "TP 2, sequence parallel",
    "pp2": "PP 2",
}
PARTS = {
    "efficiency": "useful: what one rank alone takes",
    "extra": "extra computation",
    "transfer": "transfer",
    "waiting": "waiting for the other rank",
}
LEGEND = """\
Time of the clock. *Efficiency*: strong, one rank over two times two ranks on the same batch; weak,
one rank over two ranks on twice the batch. All but milliseconds and counts are shares of the step
of two ranks (of the slower one), means of both:

- *extra*: what a rank computes, outside collectives, beyond what one rank alone takes for as much:
  work done twice (weights that both hold go through the optimizer on both), smaller matrix
  products, memory and cache shared with the other core, gloo's threads on this one;
- *transfer*: in a collective, the time of the rank that came last;
- *waiting*: for the other rank in a collective, or for a message of the other stage. *Least idle*:
  (stages - 1) / (microbatches + stages - 1) of a pipeline;
- *over weights*: of all that, zeroing of gradients, norm, update, gathering of weights;
- *gloo's threads*: processor time of a rank beside its computing thread, on the same core;
- *two runs, nothing shared*: what the machine takes when both cores are busy; no layout can do
  better than that.
"""


def write_page(path: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Write the page to ``path``, and the picture beside it where matplotlib is installed."""
    command = (
        f"tools/bench/two_ranks.py --hidden-size {args.hidden_size} "
        f"--vocab-size {args.vocab_size} --rounds {args.rounds}"
    )
    picture = path.with_suffix(".png")
    text = [
        "# Two ranks against one, on a core each\n",
        f"{made_with(command)}\nA model shaped like bench-S: {args.num_layers} layers, hidden "
        f"{args.hidden_size}, 8 experts top-2, vocabulary {args.vocab_size}; samples of "
        f"{args.seq_length} tokens,\n{args.micro_batch_size} a microbatch, "
        f"{args.global_batch_size} a step of one rank; gloo on one machine.\n",
        LEGEND,
    ]
    if plot(rows, picture):
        text.append(f"![parts of a step]({picture.name})\n")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        found = [row | {"name": NAMES[row["layout"]]} for row in rows if row["dtype"] == dtype]
        text.append(f"## {dtype}\n\n{table(found, COLUMNS)}")
        text.append("Calls of rank 0 in a step, weak:\n\n" + table(*_calls(found)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))


def _calls(rows: Rows) -> tuple[list[dict[str, object]], dict[str, str]]:
    found: list[dict[str, object]] = [
        {"layout": row["name"], "op": op, "calls": count, "mib": size / 2**20, "ms": spent}
        for row in rows
        if row["scaling"] == "weak"
        for op, (count, size, spent) in row["ops"].items()
    ]
    heads = {"layout": "", "op": "", "calls": "calls", "mib": "MiB", "ms": "transfer + waiting, ms"}
    return found, heads


def plot(rows: Rows, path: Path) -> bool:
    """Draw the parts of each step, of two ranks; return whether it was drawn."""
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for scaling in ("strong", "weak"):
            found = [r for r in rows if (r["dtype"], r["scaling"]) == (dtype, scaling)]
            bars = [
                Bar(
                    NAMES[row["layout"]],
                    {name: max(0.0, row[key] * row["step_ms"]) for key, name in PARTS.items()},
                    f"{row['efficiency']:.0%}",
                )
                for row in found
            ]
            if bars:
                title = f"{dtype}, {scaling} scaling: efficiency behind the bar"
                panels.append(BarPanel(title, "milliseconds of a step of two ranks", bars))
    return plot_bars(path, "Two ranks on a core each: where a step goes", panels)
