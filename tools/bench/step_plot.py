"""A picture of the step bench: tokens a second of ours and of others, beside the limits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS, _OTHERS, _LIMIT, _INK = "#1f6f8b", "#b8c4cc", "#b3472f", "#222222"
_LIMITS = {"peak_ms": "products at their best rate", "own_shape_ms": "products at own shapes"}


def draw_step(
    path: Path, steps: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]
) -> Path:
    """Draw one panel for each dtype to the PNG file ``path``.

    Args:
        path: Of the picture.
        steps: Rows of step.json.
        limits: Rows of step_roofline.json; none draws no limits.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row["dtype"] for row in steps))
    most = max(sum(row["dtype"] == dtype for row in steps) for dtype in dtypes)
    figure = Figure(figsize=(9.0, 0.5 + len(dtypes) * (1.1 + 0.36 * most)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
    for ax, dtype in zip(axes, dtypes, strict=True):
        rows = sorted(
            (row for row in steps if row["dtype"] == dtype), key=lambda row: row["tokens_per_s"]
        )
        sums = [row for row in limits if row["dtype"] == dtype and row["part"] == "sum"]
        _draw(ax, dtype, rows, sums)
    figure.suptitle("A training step of bench-S: tokens a second", x=0.02, ha="left", color=_INK)
    figure.savefig(path, dpi=110)
    return path


def _draw(
    ax: Any, dtype: str, rows: Sequence[Mapping[str, Any]], sums: Sequence[Mapping[str, Any]]
) -> None:
    rates = [row["tokens_per_s"] for row in rows]
    colours = [_OURS if row["what"] == "ours" else _OTHERS for row in rows]
    ax.barh([row["what"] for row in rows], rates, color=colours, height=0.68)
    for place, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        low, high = (rate * row["step_ms"] / row[key] for key in ("high_ms", "low_ms"))
        ax.plot([low, high], [place, place], color=_INK, linewidth=1.0)
        ax.annotate(
            f"{rate:,.0f}", (max(high, rate), place), (4, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=_INK,
        )  # fmt: skip
    ends = [*rates]
    tokens = rows[0]["tokens_per_s"] * rows[0]["step_ms"]
    for level, (key, name) in enumerate(_LIMITS.items()):
        for row in sums:
            ends.append(tokens / row[key])
            ax.axvline(ends[-1], color=_LIMIT, linewidth=1.1, linestyle=(0, (4, 3 + 3 * level)))
            ax.annotate(
                f"{name}: {ends[-1]:,.0f}", (ends[-1], -0.62 - 0.36 * level), (-4, 0),
                textcoords="offset points", ha="right", va="center", fontsize=8, color=_LIMIT,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip
    ax.set_ylim(-1.25 if sums else -0.6, len(rows) - 0.4)
    ax.set_xlim(0, 1.1 * max(ends))
    ax.set_title(dtype, loc="left", fontsize=10, color=_INK)
    ax.tick_params(length=0, labelsize=9, colors=_INK)
    ax.spines[["top", "right", "left"]].set_visible(False)
