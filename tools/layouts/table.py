"""Outcomes as text: a line for each while they come, and a page of them. Pure."""

from collections import Counter
from collections.abc import Sequence

from tools.layouts.verification import (
    BIT_EQUAL,
    DIFFERS,
    EQUAL,
    FAILS,
    REFUSED,
    TOO_LARGE,
    Outcome,
)

_ORDER = (DIFFERS, FAILS, BIT_EQUAL, EQUAL, REFUSED, TOO_LARGE)

HEAD = """# Layouts against one process

Written by `{command}`; do not edit. {summary}.

How to read it. Each row is one layout, trained for {steps} steps with SGD and {steps} with Adam in
{dtype} and compared with one process: initial weights, losses, every gradient by its global name,
gradient norm, weights after each step, tokens per expert and the other figures of the experts. The
error is the largest difference of an element / the largest element of its tensor; *of* names the
tensor. `bit-equal`: not one bit differs; `equal`: rounding explains what differs. A name says what
is on: `tp2 sp` is `--tensor-model-parallel-size 2 --sequence-parallel`; all names are in
`tools/layouts/axes.py`. Rows `alone` try one thing with what it needs. Rows `pair` and `triple`
hold many, so that any two were on together in some row, or are refused, with what the rules say.
A row that is not equal would say `DIFFERS`, the first tensor that differs and the likely cause, and
`make verify` would fail.

Model: `{model}`
"""


def line(outcome: Outcome) -> str:
    """Return what is printed of an outcome; more lines where something is wrong."""
    name = outcome.row.name or "one rank"
    error = "" if outcome.error is None else f"{outcome.error:8.1e}"
    head = (
        f"{outcome.verdict:10}{outcome.ranks:2} ranks {error:>8} {outcome.seconds:6.1f} s  {name}"
    )
    if outcome.verdict in (EQUAL, BIT_EQUAL):
        return head
    return "\n".join([head, *(f"{'':12}{note}" for note in outcome.notes)])


def summary(outcomes: Sequence[Outcome], bound: float) -> str:
    """Say in a sentence how it went."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    parts = [f"{counts[verdict]} {verdict}" for verdict in _ORDER if counts[verdict]]
    worst = max((o.error for o in outcomes if o.error is not None), default=0.0)
    return (
        f"{len(outcomes)} layouts: {', '.join(parts)}; worst relative error {worst:.1e}, "
        f"allowed {bound:.1e}"
    )


def page(outcomes: Sequence[Outcome], head: str) -> str:
    """Return a page in Markdown: ``head``, what was run, what was refused and why."""
    done = [o for o in outcomes if o.verdict not in (REFUSED, TOO_LARGE)]
    refused = [o for o in outcomes if o.verdict == REFUSED]
    large = [o for o in outcomes if o.verdict == TOO_LARGE]
    rows = [
        f"| {o.row.name or 'one rank'} | {o.row.why} | {o.ranks} | {_shown(o.error)} | "
        f"{o.where} | {o.seconds:.1f} | {o.verdict} |"
        for o in done
    ]
    parts = [
        head.rstrip(),
        "",
        "| layout | why | ranks | worst relative error | of | s | verdict |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        *(_section("Refused", "combinations that the rules of the configuration refuse", refused)),
        *(_section("Not run", "combinations of more ranks than asked for", large)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _shown(error: float | None) -> str:
    return "" if error is None else "0" if error == 0.0 else f"{error:.1e}"


def _section(title: str, what: str, outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return []
    rows = [f"| {o.row.name} | {'; '.join(o.notes).replace('|', '/')} |" for o in outcomes]
    head = [f"## {title}", "", f"{len(outcomes)} {what}.", "", "| layout | why |", "|---|---|"]
    return [*head, *rows, ""]
