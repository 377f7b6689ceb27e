"""The proof itself: train, kill, resume, train unbroken, resume on other layouts, compare.

The run that is killed comes first, for it decides which iteration is resumed from; the unbroken
run then keeps its tensors of that iteration. Every run is new processes.
"""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.resume import other_layouts
from tools.resume.compare import (
    AFTER_STEP,
    AT_LOAD,
    Findings,
    compare_completeness,
    compare_runs,
    compare_tensors,
)
from tools.resume.layouts import Other
from tools.resume.record_names import LOADED, after_step_folder
from tools.resume.records import Record, read_record
from tools.resume.runs import Killed, Moment, RunFailed, finish, kill
from tools.resume.settings import RecordPlan

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Optimizer -> states that it must have of every weight."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be proved."""

    script: Path
    words: list[str]
    """The user's flags."""
    world_size: int
    iterations: int
    """Steps of the unbroken run."""
    train_iters: int
    """Steps of the user's whole run."""
    save_interval: int
    seed: int
    """Draws the moment of the kill."""
    folder: Path
    """For everything that is written."""
    optimizer: str
    precision: str
    others: list[Other]
    """Layouts to resume on as well."""


@dataclass(kw_only=True)
class Proof:
    """What was found."""

    killed: Killed
    iterations: int
    """Steps of the unbroken run."""
    before: Findings
    """The killed run against the unbroken one, up to the kill."""
    resumed: Findings
    """The resumed run against the unbroken one."""
    failure: str = ""
    """Why there is no resumed run to its end; empty when there is."""
    others: list[other_layouts.Outcome] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Title -> how long a run took."""

    @property
    def passes(self) -> bool:
        """Whether nothing differs."""
        found = self.before.differences or self.resumed.differences or self.failure
        return not found and all(other.passes for other in self.others)


def prove(settings: Settings, tell: Callable[[str], None]) -> Proof:
    """Run everything, telling a line for each run.

    Raises:
        RunFailed: The user's flags do not train, or their run ends before it can be killed.
    """
    killed = _killed_run(settings, tell)
    iterations = min(max(settings.iterations, killed.checkpoint + 2), settings.train_iters)
    proof = Proof(
        killed=killed, iterations=iterations, before=Findings(), resumed=Findings(), seconds={}
    )
    kept = [killed.checkpoint, iterations]
    plan = _plan(settings, "unbroken", {"exit_interval": iterations}, keep_after=kept)
    proof.seconds["unbroken"] = seconds = finish(plan, settings.world_size, "the unbroken run")
    tell(f"unbroken run: {iterations} steps in {seconds:.1f} s")
    unbroken = read_record(Path(plan.record), settings.world_size)
    before = read_record(settings.folder / "killed", settings.world_size)
    shared = [i for i in before.iterations if i in unbroken.iterations]
    proof.before = compare_runs(unbroken, before, shared)
    _resume(settings, proof, unbroken, tell)
    for other in settings.others:
        tell(f"resuming on {other.text}")
        proof.others.append(_resume_elsewhere(settings, proof, unbroken, other))
    return proof


def _killed_run(settings: Settings, tell: Callable[[str], None]) -> Killed:
    draw = random.Random(settings.seed)
    first = settings.save_interval
    moment = Moment(draw.randint(first, max(settings.iterations - 1, first)), draw.random())
    plan = _plan(settings, "killed", _saving(settings) | {"keep_last": 2})
    killed = kill(plan, settings.world_size, moment, _saves(settings))
    tell(
        f"killed run: SIGKILL to all {settings.world_size} ranks {killed.after_ms:.0f} ms after "
        f"step {moment.step} (drawn: {moment.share:.2f} of a step, seed {settings.seed}); rank 0 "
        f"had made {killed.step} steps, iteration {killed.checkpoint} lies on the disk"
    )
    return killed


def _resume(
    settings: Settings, proof: Proof, unbroken: Record, tell: Callable[[str], None]
) -> None:
    """Resume on the same layout from what lies on the disk, and compare to the bit."""
    values = _saving(settings) | {
        "load": str(_saves(settings)),
        "exit_interval": proof.iterations,
    }
    plan = _plan(settings, "resumed", values, keep_loaded=True, keep_after=[proof.iterations])
    try:
        seconds = finish(plan, settings.world_size, "the resumed run")
    except RunFailed as error:
        proof.failure = str(error)
        tell(proof.failure)
        return
    proof.seconds["resumed"] = seconds
    begin, end = proof.killed.checkpoint, proof.iterations
    tell(f"resumed run: steps {begin + 1} to {end} in {seconds:.1f} s")
    resumed = read_record(Path(plan.record), settings.world_size)
    started = resumed.loaded[0]["iteration"]
    if started != begin:
        proof.failure = (
            f"the resumed run began at iteration {started}, not at {begin}, which lay on the disk"
        )
    steps = [i for i in resumed.iterations if i > begin]
    proof.resumed = compare_runs(unbroken, resumed, steps)
    want, got = unbroken.state(after_step_folder(begin)), resumed.state(LOADED)
    compare_tensors(proof.resumed, want, got, begin, AT_LOAD)
    compare_completeness(proof.resumed, want, got, MOMENTS[settings.optimizer], begin)
    states = [record.state(after_step_folder(end)) for record in (unbroken, resumed)]
    compare_tensors(proof.resumed, states[0], states[1], end, AFTER_STEP)


def _resume_elsewhere(
    settings: Settings, proof: Proof, unbroken: Record, other: Other
) -> other_layouts.Outcome:
    begin, end = proof.killed.checkpoint, proof.iterations
    values = other.values | {
        "load": str(_saves(settings)),
        "ckpt_step": begin,
        "exit_interval": end,
    }
    title = f"layout {len(proof.others) + 1}"
    plan = _plan(settings, title.replace(" ", "_"), values, keep_loaded=True, keep_after=[end])
    began = time.monotonic()
    try:
        finish(plan, other.world_size, f"the run resumed on {other.text}")
    except RunFailed as error:
        return other_layouts.Outcome(
            layout=other.text, seconds=time.monotonic() - began, failure=str(error)
        )
    seconds = time.monotonic() - began
    got = read_record(Path(plan.record), other.world_size)
    span = other_layouts.Span(begin, end)
    outcome = other_layouts.judge(
        unbroken, got, span, settings.precision, layout=other.text, seconds=seconds
    )
    for name in (LOADED, after_step_folder(end)):  # as large as the model and its moments
        shutil.rmtree(got.folder / name)
    return outcome


def _saves(settings: Settings) -> Path:
    return settings.folder / "checkpoints"


def _saving(settings: Settings) -> dict[str, Any]:
    return {"save": str(_saves(settings)), "save_interval": settings.save_interval}


def _plan(
    settings: Settings,
    name: str,
    values: dict[str, Any],
    *,
    keep_loaded: bool = False,
    keep_after: list[int] | None = None,
) -> RecordPlan:
    record = str(settings.folder / name)
    return RecordPlan(
        script=str(settings.script),
        words=settings.words,
        values=values | {"log_dir": record, "log_interval": 1},
        record=record,
        keep_loaded=keep_loaded,
        keep_after=keep_after or [],
    )
