"""R13: learning rate and weight decay depend on options and consumed samples, on nothing else."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.arguments import parse_args
from megatron.training.config.checkpoint_schedule import NAMES
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import config_data, schedule, schedule_problems
from megatron.training.schedule_settings import build_scheduler
from tests.helpers.stored_checkpoints import store_run

BATCH, ITERS, WARMUP, DECAY = 8, 20, 4, 16
RUN = (
    f"--mock-data --num-layers 2 --hidden-size 32 --global-batch-size {BATCH} --train-iters {ITERS}"
)
WARM = f"--lr-warmup-iters {WARMUP} --lr-warmup-init 1e-5"
TO_END = f"--min-lr 1e-4 --lr-decay-iters {DECAY}"
RATES = {
    "constant": f"--lr 1e-2 --lr-decay-style constant {WARM}",
    "linear": f"--lr 1e-2 --lr-decay-style linear {WARM} {TO_END}",
    "cosine": f"--lr 1e-2 --lr-decay-style cosine {WARM} {TO_END}",
    "inverse-square-root": f"--lr 1e-2 --lr-decay-style inverse-square-root {WARM} {TO_END}",
    **{
        f"WSD {style}": f"--lr 1e-2 --lr-decay-style WSD --lr-wsd-decay-iters 8 "
        f"--lr-wsd-decay-style {style} {WARM} {TO_END}"
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    },
}
DECAYS = {
    "constant": "--weight-decay 0.1",
    **{
        style: f"--weight-decay-incr-style {style} --start-weight-decay 0.01 --end-weight-decay 0.1"
        for style in ("linear", "cosine")
    },
}
POINTS = {"warm-up": 2, "end of warm-up": WARMUP, "decay": 10, "end": DECAY, "after": 18}
CHANGED = "--lr 3e-2 --lr-decay-style linear --lr-decay-iters 12 --weight-decay 0.3"


def parsed(words: str) -> RunConfig:
    return parse_args(f"{RUN} {words}".split(), world_size=1)


def facts_of(config: RunConfig) -> dict[str, Any]:
    common = {"schedule": schedule(config), "config": config_data(config)}
    return json.loads(json.dumps(common))


def values(made: OptimizerParamScheduler, first_step: int) -> list[tuple[float, float]]:
    """Return learning rate and weight decay of each step from one on, beyond the end."""
    samples = range(first_step * BATCH, (ITERS + 5) * BATCH, BATCH)
    return [(made.lr_at(at), made.wd_at(at)) for at in samples]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("decay", DECAYS)
def test_a_resumed_run_has_the_values_of_its_options_at_its_samples(
    tmp_path: Path, rate: str, decay: str
) -> None:
    words = f"{RATES[rate]} {DECAYS[decay]}"
    old = store_run(tmp_path, 10, f"{RUN} {words}")
    unbroken, load = build_scheduler(old), f"--load {tmp_path}"
    runs = {
        "keep": parsed(f"{words} {load}"),
        "override": parsed(f"{CHANGED} {load} --override-opt_param-scheduler"),
        "use-checkpoint": parsed(f"{CHANGED} {load} --use-checkpoint-opt_param-scheduler"),
        "finetune": parsed(f"{CHANGED} {load} --finetune"),
    }
    other = build_scheduler(parsed(CHANGED))
    for (mode, config), (point, step) in itertools.product(runs.items(), POINTS.items()):
        begin = 0 if mode == "finetune" else step
        expected = unbroken if mode in ("keep", "use-checkpoint") else other
        assert values(build_scheduler(config), begin) == values(expected, begin), (mode, point)
    for mode in ("keep", "use-checkpoint"):
        assert list(schedule_problems(facts_of(old), runs[mode])) == []
    refused = list(schedule_problems(facts_of(old), runs["override"]))
    assert "--lr is 0.01 in the checkpoint and 0.03 in this run" in refused
    assert values(unbroken, 0) != values(other, 0)


@pytest.mark.parametrize("rate", RATES)
def test_the_points_of_the_table_lie_where_they_are_said_to_lie(rate: str) -> None:
    made = build_scheduler(parsed(RATES[rate]))
    at = {point: made.lr_at(step * BATCH) for point, step in POINTS.items()}
    assert at["warm-up"] < at["end of warm-up"] == 1e-2
    if rate == "constant":
        assert at["decay"] == at["end"] == at["after"] == 1e-2
        return
    assert made.lr_at((DECAY - 1) * BATCH) < 1e-2
    assert at["after"] == 1e-4
    assert at["end of warm-up"] > at["decay"] > at["after"]


# option -> (what the checkpoint has, what this run has, both as the message names them)
CASES: dict[str, tuple[str, str, str]] = {
    "lr": ("--lr 1e-2", "--lr 2e-2", "--lr is 0.01 in the checkpoint and 0.02 in this run"),
    "min_lr": (
        "--lr 1e-2",
        "--lr 1e-2 --min-lr 1e-3",
        "--min-lr is 0.0 in the checkpoint and 0.001",
    ),
    "weight_decay": (
        "--lr 1e-2",
        "--lr 1e-2 --weight-decay 0.5",
        "--weight-decay is 0.01 in the checkpoint and 0.5 in this run",
    ),
    "lr_decay_style": (
        "--lr 1e-2",
        "--lr 1e-2 --lr-decay-style cosine",
        "--lr-decay-style is linear in the checkpoint and cosine in this run",
    ),
    "lr_decay_iters": (
        "--lr 1e-2 --lr-decay-iters 10",
        "--lr 1e-2 --lr-decay-iters 12",
        "--lr-decay-iters is 10 (x --global-batch-size 8 = 80 samples) in the checkpoint and is 12",
    ),
    "lr_warmup_iters": (
        f"--lr 1e-2 {WARM}",
        f"--lr 1e-2 {WARM} --lr-warmup-iters 5",
        "--lr-warmup-iters is 4 (x --global-batch-size 8 = 32 samples) in the checkpoint and is 5",
    ),
    "lr_warmup_fraction": (
        "--lr 1e-2 --lr-warmup-fraction 0.1",
        "--lr 1e-2 --lr-warmup-fraction 0.25",
        "--lr-warmup-iters is 2 (x --global-batch-size 8 = 16 samples) in the checkpoint and is 5",
    ),
    "lr_warmup_init": (
        f"--lr 1e-2 {WARM}",
        f"--lr 1e-2 {WARM} --lr-warmup-init 1e-4",
        "--lr-warmup-init is 1e-05 in the checkpoint and 0.0001 in this run",
    ),
    "lr_wsd_decay_style": (
        RATES["WSD linear"],
        RATES["WSD cosine"],
        "--lr-wsd-decay-style is linear in the checkpoint and cosine in this run",
    ),
    "lr_wsd_decay_iters": (
        RATES["WSD linear"],
        f"{RATES['WSD linear']} --lr-wsd-decay-iters 6",
        "--lr-wsd-decay-iters is 8 (x --global-batch-size 8 = 64 samples) in the checkpoint and is",
    ),
    "start_weight_decay": (
        f"--lr 1e-2 {DECAYS['linear']}",
        f"--lr 1e-2 {DECAYS['linear']} --start-weight-decay 0.02",
        "--start-weight-decay is 0.01 in the checkpoint and 0.02 in this run",
    ),
    "end_weight_decay": (
        f"--lr 1e-2 {DECAYS['linear']}",
        f"--lr 1e-2 {DECAYS['linear']} --end-weight-decay 0.2",
        "--end-weight-decay is 0.1 in the checkpoint and 0.2 in this run",
    ),
    "weight_decay_incr_style": (
        f"--lr 1e-2 {DECAYS['linear']}",
        f"--lr 1e-2 {DECAYS['cosine']}",
        "--weight-decay-incr-style is linear in the checkpoint and cosine in this run",
    ),
    "train_iters": (
        f"--lr 1e-2 --lr-decay-iters 16 {DECAYS['linear']}",
        f"--lr 1e-2 --lr-decay-iters 16 {DECAYS['linear']} --train-iters 40",
        "--train-iters is 20 (x --global-batch-size 8 = 160 samples) in the checkpoint and is 40",
    ),
}


def test_every_setting_has_a_case() -> None:
    assert set(NAMES) | {"train_iters"} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_changed_setting_without_a_flag_is_named_with_both_values(name: str) -> None:
    then, now, words = CASES[name]
    found = list(schedule_problems(facts_of(parsed(then)), parsed(now)))
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize("name", CASES)
def test_a_changed_setting_changes_a_value(name: str) -> None:
    then, now, _ = CASES[name]
    first, second = (build_scheduler(parsed(words)) for words in (then, now))
    assert values(first, 0) != values(second, 0)
