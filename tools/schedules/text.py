"""Schedules as text: one row a rank, time from left to right, and tables of numbers."""

import math
from collections.abc import Sequence

from megatron.core.pipeline_parallel.schedule_simulator import Run, Timeline
from megatron.core.pipeline_parallel.schedule_step import Schedule, Step

_CHUNK_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FINEST = 8
"""Ticks of the shortest step at most; finer times are rounded."""


def drawing(schedule: Schedule, timeline: Timeline, *, width: int) -> str:
    """Draw the rows of all ranks, in blocks of ``width`` columns if they are longer.

    ``F3`` is the forward of microbatch 3, with ``a`` for chunk 0, ``b`` for chunk 1 if a rank has
    several; a step goes on over ``-``, and ``.`` is time that a rank waits.
    """
    tick = _tick(timeline)
    longest = max(len(label(schedule, run.step)) for runs in timeline.runs for run in runs)
    shortest = min(run.end - run.start for runs in timeline.runs for run in runs)
    columns = math.ceil((longest + 1) / max(round(shortest / tick), 1))
    rows = [_row(schedule, runs, tick, columns) for runs in timeline.runs]
    total = round(timeline.makespan / tick) * columns
    head = len(f"rank {schedule.pp - 1} ")
    fitting = max((width - head) // columns, 1) * columns
    blocks = math.ceil(total / fitting)
    per_block = math.ceil(total / columns / blocks) * columns
    lines = [f"{schedule.name}: {_sizes(schedule)}"]
    for begin in range(0, total, per_block):
        if total > per_block:
            end = min(begin + per_block, total)
            lines.append(f"time {begin // columns * tick:g} to {end // columns * tick:g}")
        for rank, row in enumerate(rows):
            cells = row.ljust(total, ".")[begin : begin + per_block]
            lines.append(f"{f'rank {rank}'.ljust(head)}{cells}".rstrip())
    return "\n".join(lines)


def rank_table(schedule: Schedule, timeline: Timeline) -> str:
    """Tell for each rank how long it computes and waits, and what it keeps."""
    rows = [["rank", "computes", "waits", "waits %", "activations", "of a rank"]]
    peaks = schedule.peak_activations()
    for rank, busy in enumerate(timeline.busy):
        waits = timeline.makespan - busy
        rows.append(
            [
                str(rank),
                f"{busy:.4g}",
                f"{waits:.4g}",
                f"{100 * waits / timeline.makespan:.1f}",
                str(peaks[rank]),
                f"{peaks[rank] / schedule.chunks:.4g}",
            ]
        )
    unsynced = ""
    if timeline.bubble - timeline.bubble_unsynced > 1e-9:
        unsynced = f" ({100 * timeline.bubble_unsynced:.1f} % if ranks need not end together)"
    return "\n".join(
        [
            f"time {timeline.makespan:.4g}, bubble {100 * timeline.bubble:.1f} %{unsynced}",
            table(rows),
            "activations: most microbatches of a chunk kept at once; of a rank: in all its layers",
        ]
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def label(schedule: Schedule, step: Step) -> str:
    """Name a step as short as can be."""
    chunk = ""
    if schedule.chunks > len(_CHUNK_LETTERS):
        chunk = f"/{step.chunk}"
    elif schedule.chunks > 1:
        chunk = _CHUNK_LETTERS[step.chunk]
    return f"{step.kind}{step.microbatch}{chunk}"


def _row(schedule: Schedule, runs: Sequence[Run], tick: float, columns: int) -> str:
    row = ""
    for run in runs:
        start, end = round(run.start / tick) * columns, round(run.end / tick) * columns
        row = row.ljust(start, ".")
        # One blank ends a step; where rounding left it too short, its name is cut.
        room = max(end - len(row), 1)
        row += label(schedule, run.step).ljust(room - 1, "-")[: max(room - 1, 0)] + " "
    return row


def _tick(timeline: Timeline) -> float:
    """Return the longest time that all starts and ends are multiples of, or nearly so."""
    times = sorted({time for runs in timeline.runs for run in runs for time in run[1:]})
    shortest = min(run.end - run.start for runs in timeline.runs for run in runs)
    for parts in range(1, _FINEST + 1):
        tick = shortest / parts
        if all(abs(time / tick - round(time / tick)) < 1e-6 for time in times):
            return tick
    return shortest / _FINEST


def _sizes(schedule: Schedule) -> str:
    chunks = f" x {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    shape = " in a V" if schedule.v_shape else ""
    return f"{schedule.pp} ranks{chunks}{shape}, {schedule.num_microbatches} microbatches"
