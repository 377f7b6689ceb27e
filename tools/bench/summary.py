"""The page and the picture of ``make bench``, out of the JSON files that the benches left."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tools.bench.step_plot import draw_step
from tools.bench.timing import machine

PAGE = "summary.md"


class Outcome(Protocol):
    """How a bench ended."""

    @property
    def name(self) -> str:
        """Of its file."""

    @property
    def seconds(self) -> float:
        """By the clock."""

    @property
    def problem(self) -> str:
        """Empty when there was none."""


def write_summary(folder: Path, outcomes: Sequence[Outcome], *, is_quick: bool) -> Path:
    """Write the page for the JSON files in ``folder``, and the picture if it can be drawn."""
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    blocks = [f"# Benches\n\n{facts}; load and other work on it are not known."]
    if is_quick:
        blocks.append("Run with `--quick`: the sizes are tiny and the figures mean nothing.")
    ends = [
        {"bench": one.name, "seconds": one.seconds, "ended": one.problem or "well"}
        for one in outcomes
    ]
    blocks.append(markdown_table(ends))
    tables = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    blocks.append(_picture(folder, tables))
    for name, found in tables.items():
        rows = found.get("rows") or []
        if rows:
            blocks.append(f"## {name}\n\n{markdown_table(rows)}")
    page = folder / PAGE
    page.write_text("\n\n".join(blocks) + "\n")
    return page


def _picture(folder: Path, tables: Mapping[str, Any]) -> str:
    if "step" not in tables:
        return "No picture: the step was not measured."
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install -e '.[plots]')")
        return "No picture: matplotlib is not installed."
    limits = tables.get("step_roofline", {}).get("rows", [])
    path = draw_step(folder / "step.png", tables["step"]["rows"], limits)
    return f"![tokens per second of a step]({path.name})"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table; the columns are all keys, in the order in which they appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/")
