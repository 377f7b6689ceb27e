"""One picture of a run, drawn at its end from the files of metrics.py; never from live state.

Loss of training and validation against guessing (ln of the vocabulary); the share of tokens that
each expert got; how uneven the experts were over time. Needs matplotlib, which is optional.
"""

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.training.metrics import EVALUATIONS, EXPERT_LOAD, STEPS, read_lines

log = logging.getLogger(__name__)

PLOT = "training.png"
INK, GREY, TRAIN, VALID, RULE = "#222222", "#8a8a8a", "#2a6fbb", "#d1495b", "#d9d9d9"
LEGEND_ROOM = 20
"""Points between axes and title, for the row that names the curves."""
MOST_ANNOTATED = 160
"""Cells of the heat map beyond which their numbers are left out."""


class History(NamedTuple):
    """What the files of a run say."""

    steps: np.ndarray
    """[steps] iterations."""
    losses: np.ndarray
    """[steps] lm loss; NaN where it was not finite."""
    valid_steps: np.ndarray
    """[evaluations]."""
    valid_losses: np.ndarray
    """[evaluations]."""
    load_steps: np.ndarray
    """[intervals] iterations at which expert load was reported."""
    moe_layers: tuple[int, ...]
    """Global indices of the MoE layers."""
    tokens_per_expert: np.ndarray
    """[intervals, layers, experts]; empty without MoE layers; NaN for experts that a layer does
    not have."""
    max_violation: np.ndarray
    """[intervals, layers] busiest expert over the mean, minus 1."""


def read_history(folder: Path) -> History:
    """Read the files that MetricsWriter wrote to ``folder``."""
    steps = list(read_lines(folder / STEPS))
    valid = [x for x in read_lines(folder / EVALUATIONS) if x["split"] == "validation"]
    load = list(read_lines(folder / EXPERT_LOAD))
    load = [x for x in load if x["moe_layers"] == load[-1]["moe_layers"]]
    return History(
        steps=np.array([x["iteration"] for x in steps]),
        losses=np.array([_number(x["lm_loss"]) for x in steps]),
        valid_steps=np.array([x["iteration"] for x in valid]),
        valid_losses=np.array([_number(x["lm_loss"]) for x in valid]),
        load_steps=np.array([x["iteration"] for x in load]),
        moe_layers=tuple(load[-1]["moe_layers"]) if load else (),
        tokens_per_expert=_padded([x["tokens_per_expert"] for x in load]),
        max_violation=np.array([x["max_violation"] for x in load], dtype=float),
    )


def _padded(intervals: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Return the counts as one array; layers with fewer experts than others end in NaN."""
    widest = max((len(row) for layers in intervals for row in layers), default=0)
    rows = [[[*row, *[math.nan] * (widest - len(row))] for row in layers] for layers in intervals]
    return np.array(rows, dtype=float)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def smooth(values: np.ndarray, half_width: int) -> np.ndarray:
    """Return the centred running mean of ``values`` [n]; NaNs and the ends are left out of it."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    low, high = np.maximum(place - half_width, 0), np.minimum(place + half_width + 1, len(values))
    found = counts[high] - counts[low]
    return np.where(found > 0, (sums[high] - sums[low]) / np.maximum(found, 1), np.nan)


def plot_run(folder: Path, *, title: str, vocab_size: int) -> Path | None:
    """Draw the picture of the run in ``folder``; return its path, None if it cannot be drawn.

    Args:
        folder: Holds the files of metrics.py; gets ``training.png``.
        title: First line of the picture.
        vocab_size: Guessing among so many tokens costs ln(vocab_size) nats.
    """
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no plot: the package matplotlib is not installed (pip install matplotlib)")
        return None
    history = read_history(folder)
    if not len(history.steps):
        return None
    path = folder / PLOT
    temporary = path.with_name("training.tmp.png")
    draw(history, title=title, vocab_size=vocab_size).savefig(temporary)
    temporary.replace(path)
    return path


def draw(history: History, *, title: str, vocab_size: int) -> Any:
    """Return the ``matplotlib.figure.Figure`` of a run; see ``plot_run``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_experts = history.tokens_per_expert.size > 0
    figure = Figure(figsize=(11, 8.2 if has_experts else 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK, x=0.012, ha="left", weight="bold")
    grid = figure.add_gridspec(
        2 if has_experts else 1, 2, height_ratios=[1.25, 1][: 1 + has_experts]
    )
    _draw_loss(figure.add_subplot(grid[0, :]), history, math.log(vocab_size))
    if has_experts:
        _draw_load(figure, figure.add_subplot(grid[1, 0]), history)
        _draw_violation(figure.add_subplot(grid[1, 1]), history)
    return figure


def _style(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=LEGEND_ROOM)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _over_iterations(axes: Any) -> None:
    """Mark whole iterations only, and name the curves above the axes, where they hide none."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    if high - low < 1:  # one iteration: there would be no other whole number to mark
        axes.set_xlim(low - 1, high + 1)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.legend(
        fontsize=8.5,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(axes.get_legend_handles_labels()[1]),
        labelcolor=INK,
        frameon=False,
        borderpad=0.2,
        borderaxespad=0,
    )


def _draw_loss(axes: Any, history: History, guessing: float) -> None:
    steps, losses = history.steps, history.losses
    many = len(steps) > 60
    axes.plot(
        steps,
        losses,
        color=TRAIN,
        alpha=0.28 if many else 1.0,
        linewidth=0.8 if many else 1.6,
        marker="o" if len(steps) < 12 else None,
        markersize=3,
        label="training, each step" if many else "training",
    )
    if many:
        mean = smooth(losses, max(2, len(steps) // 80))
        axes.plot(steps, mean, color=TRAIN, linewidth=1.8, label="training, running mean")
    if len(history.valid_steps):
        axes.plot(
            history.valid_steps,
            history.valid_losses,
            color=VALID,
            linewidth=1.4,
            marker="o",
            markersize=4.5,
            label=f"validation, {_below(history.valid_losses[-1], guessing)}",
        )
    label = f"guessing: ln(vocabulary) = {guessing:.2f}"
    axes.axhline(guessing, color=GREY, linewidth=1, linestyle=(0, (5, 4)), label=label)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    _style(axes, "Loss", "iteration", "nats a token")
    _over_iterations(axes)
    _leave_room(axes, losses, guessing)


def _below(loss: float, guessing: float) -> str:
    side = "below" if loss <= guessing else "above"
    return f"last {loss:.3f} ({abs(guessing - loss):.2f} nats {side} guessing)"


def _leave_room(axes: Any, losses: np.ndarray, guessing: float) -> None:
    finite = losses[np.isfinite(losses)]
    if finite.size:
        low, high = float(finite.min()), float(max(guessing, np.percentile(finite, 99)))
        pad = 0.08 * max(high - low, 0.1)
        axes.set_ylim(low - 2 * pad, high + 2 * pad)


def _draw_load(figure: Any, axes: Any, history: History) -> None:
    """Draw layers x experts: share of tokens over the last quarter of the run."""
    first = history.load_steps[-1] * 0.75
    recent = history.tokens_per_expert[history.load_steps >= first].sum(0)  # [layers, experts]
    share = 100 * recent / np.maximum(np.nansum(recent, 1, keepdims=True), 1)
    even = 100 / share.shape[1]
    image = axes.imshow(
        share, cmap="RdBu_r", vmin=0, vmax=2 * even, aspect="auto", interpolation="nearest"
    )
    if share.size <= MOST_ANNOTATED:
        _annotate(axes, share, even)
    axes.set_yticks(range(len(history.moe_layers)), [str(n) for n in history.moe_layers])
    if share.shape[1] <= 16:
        axes.set_xticks(range(share.shape[1]))
    _style(
        axes, f"Share of tokens, last quarter of the run, % (even: {even:.3g})", "expert", "layer"
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, extend="max")
    bar.ax.tick_params(labelsize=7.5, length=2)
    bar.outline.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)


def _annotate(axes: Any, share: np.ndarray, even: float) -> None:
    for layer, row in enumerate(share):
        for expert, value in enumerate(row):
            if math.isnan(value):
                continue
            strong = abs(value - even) > 0.65 * even
            axes.text(
                expert,
                layer,
                f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if strong else INK,
            )


def _draw_violation(axes: Any, history: History) -> None:
    steps, violation = history.load_steps, history.max_violation
    marker = "o" if len(steps) < 12 else None
    for column in violation.T:
        axes.plot(steps, column, color=TRAIN, alpha=0.25, linewidth=0.9)
    axes.plot([], [], color=TRAIN, alpha=0.4, linewidth=0.9, label="each layer")
    mean = violation.mean(1)
    axes.plot(
        steps,
        mean,
        color=TRAIN,
        linewidth=1.8,
        marker=marker,
        markersize=3.5,
        label="mean of layers",
    )
    axes.axhline(0, color=GREY, linewidth=1, linestyle=(0, (5, 4)), label="even load")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.set_ylim(bottom=min(-0.02, -0.04 * _highest(violation)))
    _style(axes, "Busiest expert: tokens over the mean, minus 1", "iteration", "max violation")
    _over_iterations(axes)


def _highest(values: np.ndarray | Sequence[float]) -> float:
    return float(np.max(values)) if len(values) else 0.0
