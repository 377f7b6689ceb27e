"""Tables of benches as Markdown, and the sentence on the machine that every page opens with."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from tools.bench.timing import machine


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return ``rows`` as a table.

    Args:
        rows: Key -> cell; floats are rounded to three digits, None becomes "-".
        columns: Key -> heading, in their order.
    """
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def made_with(command: str) -> str:
    """Return a sentence: which command, when, and on what machine."""
    facts = machine()
    threads = f"{facts['threads']} thread" + ("" if facts["threads"] == 1 else "s")
    return (
        f"Made with `{command}` on {datetime.date.today().isoformat()}: {facts['device']} "
        f"({facts['cpu_capability']}), {threads}, torch {facts['torch']}."
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
