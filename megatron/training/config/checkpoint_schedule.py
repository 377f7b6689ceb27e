"""--use-checkpoint-opt_param-scheduler: the schedule of the checkpoint instead of this run's flags.

Options count in iterations, schedules in samples: with another batch size lengths are converted,
and one that is then no whole number of iterations is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.core.errors import CheckpointError
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.config.options import Option
from megatron.training.config.scheduler import SchedulerConfig
from megatron.training.starting_point import starting_point, stored_facts

FLAG = "--use-checkpoint-opt_param-scheduler"
LENGTHS = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
NAMES = ("lr", "min_lr", "weight_decay", *(entry.name for entry in fields(SchedulerConfig)))
"""Every option that the learning rate or the weight decay of a step depends on."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The checkpoint's schedule in this run's options."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def lines(
        self, old: dict[str, Any], given: Callable[[str], bool], options: dict[str, Option]
    ) -> Iterator[str]:
        """Yield a few words for each option whose value in this run would be another one.

        Args:
            old: Option -> value of this run as its flags say it; None where they do not.
            given: Whether the user set an option.
            options: All options, by field name.
        """
        for name, value in self.values.items():
            if value != old[name]:
                replaced = f" (not {options[name].text(old[name])})" if given(name) else ""
                yield options[name].show(value) + replaced


@dataclass(frozen=True, kw_only=True)
class StoredSchedule:
    """The schedule of a checkpoint."""

    told: str
    """What to say of it at the start."""
    values: dict[str, Any] = field(default_factory=dict)
    """Option -> resolved value in the run that saved it; empty where there is none to take."""
    batch: int = 1
    """Samples of its iteration."""
    train_iters: int = 0
    problem: str = ""

    def options(self, *, batch: int, train_iters: int) -> ScheduleOptions:
        """Say the schedule for iterations of ``batch`` samples.

        Args:
            batch: Samples of an iteration of this run.
            train_iters: Iterations of this run; weight decay that grows, grows until their end.
        """
        if self.problem or not self.values:
            return ScheduleOptions(problems=(self.problem,) if self.problem else ())
        values = dict(self.values)
        problems = []
        for name in LENGTHS:
            samples = (values.get(name) or 0) * self.batch
            if samples % batch:
                problems.append(
                    f"{FLAG}: --{name.replace('_', '-')} is {values[name]} x --global-batch-size "
                    f"{self.batch} = {samples} samples in the checkpoint, no whole number of "
                    f"iterations of --global-batch-size {batch}"
                )
            elif samples:
                values[name] = samples // batch
        grown, growing = self.train_iters * self.batch, train_iters * batch
        if values.get("weight_decay_incr_style") != "constant" and grown != growing:
            problems.append(
                f"{FLAG}: weight decay grows until the end of training, after {grown} samples in "
                f"the checkpoint and {growing} in this run (--train-iters {train_iters} x "
                f"--global-batch-size {batch}); --override-opt_param-scheduler takes this run's"
            )
        return ScheduleOptions(values=values, problems=tuple(problems))


def stored_schedule(options: CheckpointConfig) -> StoredSchedule | None:
    """Return the schedule of the checkpoint that a run begins with; None where it is not wanted."""
    if not options.use_checkpoint_opt_param_scheduler:
        return None
    try:
        start = starting_point(options)
        if start is None or start.weights_only:
            why = "there is no checkpoint to resume from yet"
            return StoredSchedule(told=f"{FLAG}: {why}, so the schedule is that of the flags")
        sections = stored_facts(start)["config"]
    except CheckpointError as error:
        return StoredSchedule(told="", problem=str(error))
    stored = {name: value for section in sections.values() for name, value in section.items()}
    return StoredSchedule(
        told=f"{FLAG}: schedule of {start.path}",
        values={name: stored[name] for name in NAMES if name in stored},
        batch=stored["global_batch_size"],
        train_iters=stored["train_iters"],
    )
