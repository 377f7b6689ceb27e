import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

STYLES = ["constant", "linear", "cosine", "inverse-square-root"]
WSD = ["exponential", "linear", "cosine", "minus_sqrt"]
SCHEDULES = [{"lr_decay_style": style} for style in STYLES] + [
    {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "wsd_decay_steps": 200} for style in WSD
]


def scheduler(**changes):
    settings = {
        "init_lr": 0.1,
        "max_lr": 1.1,
        "min_lr": 0.01,
        "lr_warmup_steps": 100,
        "lr_decay_steps": 1100,
        "lr_decay_style": "linear",
        "start_wd": 0.0,
        "end_wd": 0.4,
        "wd_incr_steps": 1000,
        "wd_incr_style": "linear",
    }
    return OptimizerParamScheduler(**{**settings, **changes})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_from_init_to_max_in_every_style(schedule):
    made = scheduler(**schedule)
    assert made.lr_at(0) == 0.1
    assert made.lr_at(50) == pytest.approx(0.6)
    assert made.lr_at(100) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ({"lr_decay_style": "constant"}, {600: 1.1, 1100: 1.1, 9000: 1.1}),
        ({"lr_decay_style": "linear"}, {350: 0.8275, 600: 0.555, 1100: 0.01, 9000: 0.01}),
        (
            {"lr_decay_style": "cosine"},
            {350: 0.01 + 1.09 * 0.5 * (1 + math.sqrt(0.5)), 600: 0.555, 1100: 0.01, 1101: 0.01},
        ),
        (
            {"lr_decay_style": "inverse-square-root"},
            {400: 0.55, 900: 1.1 / 3, 1100: 1.1 / math.sqrt(11), 1101: 0.01},
        ),
        (
            {"lr_decay_style": "inverse-square-root", "min_lr": 0.5},
            {400: 0.55, 900: 0.5},
        ),
    ],
)
def test_decay_follows_its_formula(schedule, values):
    made = scheduler(**schedule)
    for samples, value in values.items():
        assert made.lr_at(samples) == pytest.approx(value)


@pytest.mark.parametrize(
    ("style", "half"),
    [
        ("exponential", 2 * math.sqrt(0.5) - 1),
        ("linear", 0.5),
        ("cosine", 0.5),
        ("minus_sqrt", 1 - math.sqrt(0.5)),
    ],
)
def test_wsd_is_flat_and_then_decays_at_the_end(style, half):
    made = scheduler(lr_decay_style="WSD", lr_wsd_decay_style=style, wsd_decay_steps=200)
    assert {made.lr_at(samples) for samples in (101, 500, 900)} == {1.1}
    assert made.lr_at(1000) == pytest.approx(0.01 + 1.09 * half)
    assert made.lr_at(1100) == pytest.approx(0.01)
    assert made.lr_at(1101) == 0.01


@pytest.mark.parametrize(("style", "quarter"), [("linear", 0.1), ("cosine", 0.2 * (1 - 0.5**0.5))])
def test_weight_decay_increases_to_its_end(style, quarter):
    made = scheduler(wd_incr_style=style)
    assert made.wd_at(0) == pytest.approx(0.0)
    assert made.wd_at(250) == pytest.approx(quarter)
    assert made.wd_at(500) == pytest.approx(0.2)
    assert made.wd_at(1000) == pytest.approx(0.4)
    assert made.wd_at(5000) == 0.4


def test_constant_weight_decay_needs_no_length():
    made = scheduler(wd_incr_style="constant", start_wd=0.1, end_wd=0.1, wd_incr_steps=0)
    assert [made.wd_at(samples) for samples in (0, 1, 10**9)] == [0.1] * 3


@given(st.sampled_from(SCHEDULES), st.integers(100, 3000), st.integers(0, 500))
def test_after_warm_up_the_learning_rate_never_rises_and_stays_in_its_bounds(
    schedule, samples, further
):
    made = scheduler(**schedule)
    now, later = made.lr_at(samples), made.lr_at(samples + further)
    assert 0.01 - 1e-12 <= later <= now + 1e-12 <= 1.1 + 2e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("resume_at", [40, 100, 480, 960, 1100, 1200])
@pytest.mark.parametrize("mode", ["keep", "override", "finetune"])
def test_a_resumed_schedule_equals_an_unbroken_one(schedule, resume_at, mode):
    batch = 20
    first = scheduler(**schedule)
    changes = schedule if mode == "keep" else {**schedule, "max_lr": 2.0}
    resumed = scheduler(**changes)
    begin = 0 if mode == "finetune" else resume_at
    unbroken, ours, theirs = scheduler(**changes), _optimizer(), _optimizer()
    for samples in range(0, begin + 10 * batch, batch):
        unbroken.step(theirs, samples)
        if samples >= begin:
            resumed.step(ours, samples)
            assert ours.param_groups == theirs.param_groups
            assert (ours.param_groups[0]["lr"] == first.lr_at(samples)) == (
                mode == "keep" or resumed.lr_at(samples) == 0.01 or samples == 0
            )


def _optimizer():
    return SimpleNamespace(
        param_groups=[{"wd_mult": 1.0, "lr_mult": 1.0}, {"wd_mult": 0.0, "lr_mult": 0.5}, {}]
    )


def test_groups_are_set_with_their_multipliers():
    made, optimizer = scheduler(), _optimizer()
    made.step(optimizer, 600)
    lr, wd = made.lr_at(600), made.wd_at(600)
    assert [g["lr"] for g in optimizer.param_groups] == [lr, 0.5 * lr, lr]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [wd, 0.0, wd]


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"min_lr": 2.0}, ["--min-lr 2.0 must lie between 0 and --lr 1.1"]),
        ({"init_lr": -1.0}, ["--lr-warmup-init -1.0 must lie between 0 and --lr 1.1"]),
        ({"lr_decay_steps": 0}, ["--lr-decay-iters must be at least 1"]),
        ({"lr_warmup_steps": 1100}, ["warm-up of 1100 samples must end before the decay"]),
        ({"start_wd": 0.5}, ["--start-weight-decay 0.5 must lie between 0 and"]),
        ({"wd_incr_style": "constant"}, ["differ: choose --weight-decay-incr-style"]),
        ({"lr_decay_style": "WSD"}, ["--lr-decay-style WSD needs --lr-wsd-decay-iters"]),
        (
            {"lr_decay_style": "WSD", "wsd_decay_steps": 1001, "min_lr": 3.0},
            ["--min-lr 3.0", "--lr-wsd-decay-iters (= 1001 samples) must be at least 1 and fit"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_all_at_once(changes, sentences):
    with pytest.raises(ConfigError) as error:
        scheduler(**changes)
    for sentence in sentences:
        assert sentence in str(error.value)
    assert str(error.value).count("  - ") == len(sentences)


def test_the_last_sample_of_warm_up_and_the_first_of_decay_join():
    for schedule, delta in itertools.product(SCHEDULES, (0, 1)):
        assert scheduler(**schedule).lr_at(100 + delta) == pytest.approx(1.1, rel=1e-2)
