"""Pictures of benches: curves in panels, and bars in parts. Needs matplotlib, which is optional.

Knows numbers and names, no bench. A picture is left out, with one line that says so, where
matplotlib is not installed; the tables and JSON files hold the same figures.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

INK, GREY, RULE = "#222222", "#8a8a8a", "#d9d9d9"
COLOURS = ("#2a6fbb", "#d1495b", "#3a8a5c", "#b7791f", "#6b4fa0", "#8a8a8a", "#17828c", "#c2577f")


class Curve(NamedTuple):
    """Points joined by a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_expected: bool = False
    """Drawn dashed and grey, without marks: what it is compared with."""


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_is_log: bool = True
    """To the base 2, with every x of the curves marked by its number."""
    y_is_log: bool = True


class Bar(NamedTuple):
    """A bar in parts, one after the other."""

    name: str
    parts: dict[str, float]
    """Name of a part -> its length; a name has one colour in the whole picture."""
    note: str = ""
    """Written behind the end."""


class BarPanel(NamedTuple):
    """Bars below one another that share an axis."""

    title: str
    x_label: str
    bars: Sequence[Bar]
    limits: dict[str, float] = {}
    """Name -> where a dashed line is drawn across all bars."""


def can_draw() -> bool:
    """Say whether matplotlib is there; print why there is no picture if not."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: the package matplotlib is not installed (pip install matplotlib)")
        return False
    return True


def plot_curves(path: Path, title: str, panels: Sequence[Panel], *, columns: int = 3) -> bool:
    """Draw ``panels`` row by row to the PNG file ``path``; return whether it was drawn."""
    if not can_draw():
        return False
    rows = -(-len(panels) // columns)
    figure = _figure(title, width=4.2 * min(columns, len(panels)), height=0.5 + 3.4 * rows)
    for place, panel in enumerate(panels):
        _draw_curves(figure.add_subplot(rows, min(columns, len(panels)), place + 1), panel)
    return _save(figure, path)


def plot_bars(path: Path, title: str, panels: Sequence[BarPanel]) -> bool:
    """Draw ``panels`` one below the other to the PNG file ``path``; say whether it was drawn."""
    if not can_draw():
        return False
    most = [len(panel.bars) for panel in panels]
    figure = _figure(title, width=9.5, height=0.6 + sum(0.95 + 0.36 * n for n in most))
    grid = figure.add_gridspec(len(panels), 1, height_ratios=[1.6 + n for n in most])
    names = dict.fromkeys(name for panel in panels for bar in panel.bars for name in bar.parts)
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    for place, panel in enumerate(panels):
        _draw_bars(figure.add_subplot(grid[place, 0]), panel, colours)
    _legend_of_parts(figure, colours)
    return _save(figure, path)


def _figure(title: str, *, width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=INK, x=0.012, ha="left", weight="bold")
    return figure


def _save(figure: Any, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(temporary, metadata={"Software": None})
    temporary.replace(path)
    print(f"plot    {path}")
    return True


def _style(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x_label, fontsize=8.5, color=INK)
    axes.set_ylabel(y_label, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_curves(axes: Any, panel: Panel) -> None:
    colours = iter(COLOURS * len(panel.curves))
    for curve in panel.curves:
        look: dict[str, Any] = {"color": GREY, "linestyle": (0, (5, 4)), "linewidth": 1.2}
        if not curve.is_expected:
            look = {"color": next(colours), "marker": "o", "markersize": 3.5, "linewidth": 1.5}
        axes.plot(curve.x, curve.y, label=curve.name, **look)
    _style(axes, panel.title, panel.x_label, panel.y_label)
    marks = sorted({x for curve in panel.curves for x in curve.x})
    if panel.x_is_log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(marks, [f"{x:g}" for x in marks])
        axes.minorticks_off()
    if panel.y_is_log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def _draw_bars(axes: Any, panel: BarPanel, colours: dict[str, str]) -> None:
    ends = [sum(bar.parts.values()) for bar in panel.bars]
    for place, bar in enumerate(panel.bars):
        start = 0.0
        for name, length in bar.parts.items():
            axes.barh(place, length, left=start, height=0.66, color=colours[name])
            start += length
        axes.annotate(
            bar.note, (start, place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color=INK,
        )  # fmt: skip
    for name, value in panel.limits.items():
        axes.axvline(value, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            name, (value, -0.6), xytext=(3, 0), textcoords="offset points", fontsize=7.5, color=INK
        )
    _style(axes, panel.title, panel.x_label, "")
    axes.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars])
    axes.set_ylim(len(panel.bars) - 0.4, -0.8 if panel.limits else -0.6)
    axes.set_xlim(0, 1.18 * max([*ends, *panel.limits.values(), 1e-12]))
    axes.grid(axis="x", color=RULE, linewidth=0.6)


def _legend_of_parts(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(
        handles=patches, loc="outside lower left", ncols=min(len(patches), 5), fontsize=8,
        frameon=False, labelcolor=INK,
    )  # fmt: skip
