"""Schedules as SVG: a bar for each step, a row for each rank. Written by hand, no package."""

from megatron.core.pipeline_parallel.schedule_simulator import Run, Timeline
from megatron.core.pipeline_parallel.schedule_step import Schedule

ROW, GAP, LEFT, RIGHT, TOP, BOTTOM = 26, 6, 64, 150, 64, 56
PIXELS_A_LABEL = 8.0
MIN_WIDTH, MAX_WIDTH = 640, 12000
# Kind -> (name, hue, saturation); later chunks are lighter.
_KINDS = {
    "F": ("forward", 212, 62),
    "B": ("backward", 150, 42),
    "I": ("input gradient", 172, 50),
    "W": ("weight gradient", 34, 78),
}
_DARKEST, _LIGHTEST = 42, 72


def svg_page(schedule: Schedule, timeline: Timeline) -> str:
    """Return the whole file."""
    shortest = min(run.end - run.start for runs in timeline.runs for run in runs)
    digits = len(str(schedule.num_microbatches - 1))
    scale = max(PIXELS_A_LABEL * digits + 4, 16) / shortest
    inner = min(max(timeline.makespan * scale, MIN_WIDTH - LEFT - RIGHT), MAX_WIDTH)
    scale = inner / timeline.makespan
    rows_end = TOP + schedule.pp * (ROW + GAP)
    width, height = LEFT + inner + RIGHT, rows_end + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 24, _title(schedule, timeline), size=15, anchor="start"),
        _text(LEFT + inner + 12, TOP - 10, "waits", anchor="start", fill="#666"),
        _text(LEFT + inner + 72, TOP - 10, "activations", anchor="start", fill="#666"),
    ]
    peaks = schedule.peak_activations()
    for rank, runs in enumerate(timeline.runs):
        top = TOP + rank * (ROW + GAP)
        middle = top + ROW / 2 + 4
        waits = 1 - timeline.busy[rank] / timeline.makespan
        parts += [
            f'<rect x="{LEFT}" y="{top}" width="{inner:.2f}" height="{ROW}" fill="#f1f1f1"/>',
            _text(LEFT - 10, middle, f"rank {rank}", anchor="end"),
            *(_bar(schedule, run, top, scale) for run in runs),
            _text(LEFT + inner + 12, middle, f"{100 * waits:.1f} %", anchor="start"),
            _text(LEFT + inner + 72, middle, str(peaks[rank]), anchor="start"),
        ]
    parts += [*_axis(timeline, rows_end, scale), *_legend(schedule, rows_end + 40), "</svg>"]
    return "\n".join(parts) + "\n"


def _title(schedule: Schedule, timeline: Timeline) -> str:
    chunks = f", {schedule.chunks} chunks a rank" if schedule.chunks > 1 else ""
    shape = " in a V" if schedule.v_shape else ""
    return (
        f"{schedule.name}: {schedule.pp} ranks{chunks}{shape}, {schedule.num_microbatches} "
        f"microbatches, bubble {100 * timeline.bubble:.1f} %"
    )


def _bar(schedule: Schedule, run: Run, top: float, scale: float) -> str:
    left, width = LEFT + run.start * scale, (run.end - run.start) * scale
    fill = _colour(run.step.kind, run.step.chunk, schedule.chunks)
    light = _lightness(run.step.chunk, schedule.chunks) > 58
    number = str(run.step.microbatch)
    name = _KINDS[run.step.kind][0]
    bar = (
        f'<rect x="{left:.2f}" y="{top}" width="{width:.2f}" height="{ROW}" fill="{fill}" '
        f'stroke="white" stroke-width="1"><title>{name}, microbatch {number}, chunk '
        f"{run.step.chunk}: {run.start:g} to {run.end:g}</title></rect>"
    )
    if width < PIXELS_A_LABEL * len(number):
        return bar
    return bar + _text(
        left + width / 2, top + ROW / 2 + 4, number, fill="#111" if light else "white"
    )


def _axis(timeline: Timeline, top: float, scale: float) -> list[str]:
    """Draw about one mark each 80 pixels, at round times."""
    rough = 80 / scale
    power = 10.0
    while power > rough:
        power /= 10
    while power * 10 <= rough:
        power *= 10
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    parts = []
    for mark in range(int(timeline.makespan / step + 1e-9) + 1):
        left = LEFT + mark * step * scale
        parts.append(
            f'<line x1="{left:.2f}" y1="{top}" x2="{left:.2f}" y2="{top + 5}" stroke="#888"/>'
        )
        parts.append(_text(left, top + 18, f"{mark * step:g}", size=11, fill="#666"))
    return parts


def _legend(schedule: Schedule, middle: float) -> list[str]:
    used = {step.kind for steps in schedule.steps for step in steps}
    left, parts = float(LEFT), []
    for kind, (name, _, _) in _KINDS.items():
        if kind not in used:
            continue
        for chunk in range(schedule.chunks):
            colour = _colour(kind, chunk, schedule.chunks)
            parts.append(
                f'<rect x="{left:.0f}" y="{middle - 10:.0f}" width="12" height="12" '
                f'fill="{colour}"/>'
            )
            left += 14
        parts.append(_text(left + 4, middle, name, anchor="start"))
        left += 4 + 7 * len(name) + 20
    if schedule.chunks > 1:
        parts.append(_text(left, middle, "lighter: later chunk", anchor="start", fill="#666"))
    return parts


def _lightness(chunk: int, chunks: int) -> float:
    return _DARKEST + (_LIGHTEST - _DARKEST) * chunk / max(chunks - 1, 1)


def _colour(kind: str, chunk: int, chunks: int) -> str:
    _, hue, saturation = _KINDS[kind]
    return f"hsl({hue}, {saturation}%, {_lightness(chunk, chunks):.0f}%)"


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "middle", fill: str = "#111"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{fill}">{text}</text>'
    )
