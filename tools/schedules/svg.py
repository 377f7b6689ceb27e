"""Schedules as SVG: a bar for each step, a row for each rank. Written by hand, no package.

A long schedule is broken into lines, as text is: each line has all ranks for a part of the time.
"""

import colorsys
import math
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedule_simulator import Run, Timeline
from megatron.core.pipeline_parallel.schedule_step import Schedule

ROW, GAP, LEFT, RIGHT, TOP, AXIS, LEGEND = 26, 6, 64, 150, 68, 36, 28
DIGIT, MIN_WIDTH, MAX_WIDTH = 8.0, 560, 1600
# Kind -> (name, hue in degrees, saturation in percent); later chunks are lighter.
_KINDS = {
    "F": ("forward", 212, 62),
    "B": ("backward", 150, 45),
    "I": ("input gradient", 176, 55),
    "W": ("weight gradient", 32, 80),
}
_DARKEST, _LIGHTEST, _WHITE_TEXT_BELOW = 40, 74, 56


class _Line(NamedTuple):
    """A part of the time, and where it is drawn."""

    begin: float
    end: float
    top: float
    scale: float

    def x(self, time: float) -> float:
        return LEFT + (time - self.begin) * self.scale


def svg_page(schedule: Schedule, timeline: Timeline) -> str:
    """Return the whole file."""
    lines = _lines(schedule, timeline)
    inner = lines[0].x(lines[0].end) - LEFT
    bottom = lines[-1].top + schedule.pp * (ROW + GAP) + AXIS
    width, height = LEFT + inner + RIGHT, bottom + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(LEFT, 26, _title(schedule, timeline), size=15, anchor="start"),
        *_margin(schedule, timeline, LEFT + inner),
    ]
    for line in lines:
        for rank, runs in enumerate(timeline.runs):
            top = line.top + rank * (ROW + GAP)
            full = line.x(min(line.end, timeline.makespan)) - LEFT
            parts += [
                f'<rect x="{LEFT}" y="{top:.0f}" width="{full:.2f}" height="{ROW}" '
                'fill="#eeeeee"/>',
                _text(LEFT - 10, top + ROW / 2 + 4, f"rank {rank}", anchor="end"),
                *(_bar(schedule, run, top, line) for run in runs if _meets(run, line)),
            ]
        parts += _axis(timeline, line, line.top + schedule.pp * (ROW + GAP))
    parts += [*_legend(schedule, bottom + 8), "</svg>"]
    return "\n".join(parts) + "\n"


def _lines(schedule: Schedule, timeline: Timeline) -> list[_Line]:
    """Make steps wide enough for their numbers, and lines no longer than ``MAX_WIDTH``."""
    shortest = min(run.end - run.start for runs in timeline.runs for run in runs)
    digits = len(str(schedule.num_microbatches - 1))
    wanted = timeline.makespan / shortest * max(DIGIT * digits + 4, 16)
    count = math.ceil(wanted / MAX_WIDTH)
    inner = max(wanted / count, MIN_WIDTH)
    span = timeline.makespan / count
    height = schedule.pp * (ROW + GAP) + AXIS
    return [
        _Line(number * span, (number + 1) * span, TOP + number * height, inner / span)
        for number in range(count)
    ]


def _title(schedule: Schedule, timeline: Timeline) -> str:
    chunks = f", {schedule.chunks} chunks a rank" if schedule.chunks > 1 else ""
    shape = " in a V" if schedule.v_shape else ""
    return (
        f"{schedule.name}: {schedule.pp} ranks{chunks}{shape}, {schedule.num_microbatches} "
        f"microbatches, bubble {100 * timeline.bubble:.1f} %"
    )


def _margin(schedule: Schedule, timeline: Timeline, left: float) -> list[str]:
    """Write beside the first line what each rank waits and keeps."""
    waits_x, keeps_x = left + 52, left + 138
    parts = [
        _text(waits_x, TOP - 10, "waits", anchor="end", fill="#666666"),
        _text(keeps_x, TOP - 10, "activations", anchor="end", fill="#666666"),
    ]
    for rank, peak in enumerate(schedule.peak_activations()):
        middle = TOP + rank * (ROW + GAP) + ROW / 2 + 4
        waits = 1 - timeline.busy[rank] / timeline.makespan
        parts += [
            _text(waits_x, middle, f"{100 * waits:.1f} %", anchor="end"),
            _text(keeps_x, middle, str(peak), anchor="end"),
        ]
    return parts


def _meets(run: Run, line: _Line) -> bool:
    return run.start < line.end - 1e-9 and run.end > line.begin + 1e-9


def _bar(schedule: Schedule, run: Run, top: float, line: _Line) -> str:
    left, right = line.x(max(run.start, line.begin)), line.x(min(run.end, line.end))
    lightness = _lightness(run.step.chunk, schedule.chunks)
    number, name = str(run.step.microbatch), _KINDS[run.step.kind][0]
    bar = (
        f'<rect x="{left:.2f}" y="{top:.0f}" width="{right - left:.2f}" height="{ROW}" '
        f'fill="{_colour(run.step.kind, lightness)}" stroke="#ffffff" stroke-width="1"><title>'
        f"{name}, microbatch {number}, chunk {run.step.chunk}: {run.start:g} to {run.end:g}"
        "</title></rect>"
    )
    if right - left < DIGIT * len(number):
        return bar
    fill = "#ffffff" if lightness < _WHITE_TEXT_BELOW else "#111111"
    return bar + _text((left + right) / 2, top + ROW / 2 + 4, number, fill=fill)


def _axis(timeline: Timeline, line: _Line, top: float) -> list[str]:
    """Draw about one mark each 80 pixels, at round times."""
    rough = 80 / line.scale
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(line.begin / step - 1e-9)
    last = math.floor(min(line.end, timeline.makespan) / step + 1e-9)
    parts = []
    for mark in range(first, last + 1):
        x = line.x(mark * step)
        parts.append(
            f'<line x1="{x:.2f}" y1="{top:.0f}" x2="{x:.2f}" y2="{top + 5:.0f}" stroke="#888888"/>'
        )
        parts.append(_text(x, top + 18, f"{mark * step:g}", size=11, fill="#666666"))
    return parts


def _legend(schedule: Schedule, middle: float) -> list[str]:
    used = {step.kind for steps in schedule.steps for step in steps}
    left, parts = float(LEFT), []
    for kind, (name, _, _) in _KINDS.items():
        if kind not in used:
            continue
        for chunk in range(schedule.chunks):
            colour = _colour(kind, _lightness(chunk, schedule.chunks))
            parts.append(
                f'<rect x="{left:.0f}" y="{middle - 10:.0f}" width="12" height="12" '
                f'fill="{colour}"/>'
            )
            left += 14
        parts.append(_text(left + 4, middle, name, anchor="start"))
        left += 4 + 6.5 * len(name) + 20
    if schedule.chunks > 1:
        parts.append(_text(left, middle, "lighter: later chunk", anchor="start", fill="#666666"))
    return parts


def _lightness(chunk: int, chunks: int) -> float:
    return _DARKEST + (_LIGHTEST - _DARKEST) * chunk / max(chunks - 1, 1)


def _colour(kind: str, lightness: float) -> str:
    """Return ``#rrggbb``: not every viewer knows hsl()."""
    _, hue, saturation = _KINDS[kind]
    rgb = colorsys.hls_to_rgb(hue / 360, lightness / 100, saturation / 100)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "middle", fill: str = "#111111"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{fill}">{text}</text>'
    )
