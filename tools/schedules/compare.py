"""Several schedules in one table."""

from collections.abc import Sequence

from megatron.core.pipeline_parallel.schedule_simulator import Costs, SendKind, simulate
from megatron.core.pipeline_parallel.schedule_step import Schedule
from tools.schedules.text import table


def comparison(schedules: Sequence[Schedule], costs: Costs, *, sends: SendKind) -> str:
    """Tell what each schedule costs in time, waiting, memory and messages."""
    rows = [
        [
            "schedule",
            "chunks",
            "time",
            "bubble %",
            "not synced %",
            "activations",
            "of a rank",
            "sends a rank",
        ]
    ]
    for schedule in schedules:
        timeline = simulate(schedule, costs, sends=sends)
        peak = max(schedule.peak_activations())
        rows.append(
            [
                schedule.name,
                str(schedule.chunks),
                f"{timeline.makespan:.4g}",
                f"{100 * timeline.bubble:.1f}",
                f"{100 * timeline.bubble_unsynced:.1f}",
                str(peak),
                f"{peak / schedule.chunks:.4g}",
                str(max(_sends(schedule))),
            ]
        )
    first = schedules[0]
    return "\n".join(
        [
            f"{first.pp} ranks, {first.num_microbatches} microbatches; of one through a rank: "
            f"forward {costs.forward:g}, input gradient {costs.input_grad:g}, weight gradient "
            f"{costs.weight_grad:g}; message {costs.comm:g}",
            table(rows),
            "not synced: if each rank goes on to the next step of training when it is through;",
            "activations: most microbatches of a chunk kept at once on a rank; of a rank: in all "
            "its layers",
        ]
    )


def _sends(schedule: Schedule) -> list[int]:
    return [
        sum(schedule.receiver(schedule.makes(rank, step)) is not None for step in steps)
        for rank, steps in enumerate(schedule.steps)
    ]
