"""--use-checkpoint-opt_param-scheduler: the schedule of the checkpoint, whatever the flags say."""

import json
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import config_data, schedule, schedule_problems
from megatron.training.schedule_settings import build_scheduler
from tests.helpers.stored_checkpoints import store_run

MODEL = "--mock-data --num-layers 2 --hidden-size 32"
TAKE = "--use-checkpoint-opt_param-scheduler"
FLAGS = {
    "constant": "--lr 1e-3 --lr-decay-style constant",
    "warm-up": "--lr 1e-3 --lr-decay-style constant --lr-warmup-fraction 0.07",
    "linear": "--lr 1e-3 --lr-warmup-iters 2 --lr-warmup-init 1e-5 --weight-decay 0.1",
    "cosine": "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 8",
    "root": "--lr 1e-3 --min-lr 1e-4 --lr-decay-style inverse-square-root --lr-warmup-iters 1",
    "WSD": "--lr 1e-3 --lr-decay-style WSD --lr-wsd-decay-iters 4 --lr-wsd-decay-style minus_sqrt",
    "derived": "",
}
OTHERS = ("--lr 5e-3 --min-lr 1e-6 --lr-decay-iters 30 --lr-warmup-iters 1", "--weight-decay 0.3")


def parsed(words: str) -> RunConfig:
    return parse_args(f"{MODEL} {words}".split(), world_size=1)


def samples_of(config: RunConfig) -> list[tuple[float, float]]:
    made = build_scheduler(config)
    return [(made.lr_at(samples), made.wd_at(samples)) for samples in range(0, 140, 2)]


@pytest.mark.parametrize("style", FLAGS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("batch", "iters"), [(8, 25), (4, 50), (16, 10)])
def test_every_setting_is_the_checkpoints(
    tmp_path: Path, style: str, other: str, batch: int, iters: int
) -> None:
    old = store_run(tmp_path, 3, f"{MODEL} --global-batch-size 8 --train-iters 10 {FLAGS[style]}")
    words = f"--load {tmp_path} --global-batch-size {batch} --train-iters {iters} {other} {TAKE}"
    if batch == 16 and style in ("root",):
        with pytest.raises(ConfigError, match="--lr-warmup-iters is 1 x --global-batch-size 8 = 8"):
            parsed(words)
        return
    new = parsed(words)
    assert samples_of(new) == samples_of(old)
    common = {"schedule": schedule(old), "config": config_data(old)}
    assert list(schedule_problems(json.loads(json.dumps(common)), new)) == []
    assert samples_of(parsed(words.removesuffix(TAKE))) != samples_of(old)


def test_what_is_taken_is_told_with_what_it_replaces(tmp_path: Path) -> None:
    store_run(tmp_path, 3, f"{MODEL} --global-batch-size 8 --train-iters 10 {FLAGS['cosine']}")
    words = f"--load {tmp_path} --global-batch-size 8 --train-iters 10 --lr 2e-3 {TAKE}"
    config = parsed(words)
    (line,) = [notice for notice in config.notices if "opt_param" in notice]
    assert line == (
        f"{TAKE}: schedule of {tmp_path}/iter_0000003: --lr 0.001 (not 0.002), --min-lr 0.0001, "
        "--lr-decay-style cosine, --lr-decay-iters 8"
    )
    assert config.sources["lr"] == "checkpoint"
    same = parsed(
        f"--load {tmp_path} --global-batch-size 8 --train-iters 10 {FLAGS['cosine']} {TAKE}"
    )
    assert any(notice.endswith("iter_0000003: as the flags say") for notice in same.notices)


def test_growing_weight_decay_ends_where_it_would_have(tmp_path: Path) -> None:
    grows = "--lr 1e-3 --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1"
    old = store_run(tmp_path, 3, f"{MODEL} --global-batch-size 8 --train-iters 10 {grows}")
    words = f"--load {tmp_path} {TAKE} --lr 1e-3 --weight-decay 0.5"
    same = parsed(f"{words} --global-batch-size 4 --train-iters 20")
    assert samples_of(same) == samples_of(old)
    with pytest.raises(ConfigError) as error:
        parsed(f"{words} --global-batch-size 8 --train-iters 20")
    (problem,) = error.value.problems
    assert "after 80 samples in the checkpoint and 160 in this run" in problem
    assert "--override-opt_param-scheduler" in problem


def test_a_first_start_keeps_its_own_schedule(tmp_path: Path) -> None:
    words = f"--load {tmp_path}/own --allow-fresh-start --train-iters 10 --lr 2e-3 {TAKE}"
    config = parsed(words)
    assert config.optimizer.lr == 2e-3
    assert any("no checkpoint to resume from yet" in notice for notice in config.notices)
    store_run(tmp_path / "other", 3, f"{MODEL} --train-iters 10 --lr 1e-3")
    begun = words.replace("--allow-fresh-start", f"--pretrained-checkpoint {tmp_path / 'other'}")
    assert parsed(begun).optimizer.lr == 2e-3


def test_a_damaged_checkpoint_is_named_once(tmp_path: Path) -> None:
    store_run(tmp_path, 3, f"{MODEL} --train-iters 10 --lr 1e-3")
    (tmp_path / "iter_0000003" / "common.json").write_text("{")
    with pytest.raises(ConfigError) as error:
        parsed(f"--load {tmp_path} --train-iters 10 {TAKE}")
    (problem,) = error.value.problems
    assert "common.json is damaged" in problem
