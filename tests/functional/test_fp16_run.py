"""fp16 as users run it: the log, resume while the scale falls and after, what ends a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors
from megatron.training.checkpoint_model import load_trained_model

ROOT = Path(__file__).resolve().parents[2]
FLAGS = """
    --mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32
    --num-experts 4 --moe-router-topk 2 --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.02 --hidden-dropout 0.1
    --micro-batch-size 2 --global-batch-size 4 --train-iters 40 --lr 3e-3
    --lr-decay-style cosine --lr-warmup-iters 3 --eval-iters 0 --log-interval 1 --device cpu
    --fp16
"""
WINDOW = "--loss-scale-window 8"
SEARCHING, FOUND = 8, 24
"""Iterations to resume from: in the first the scale falls, in the second it has risen."""
LINE = re.compile(
    r"iteration +(\d+)/ +40 .* loss scale: ([\d.]+) \|( grad norm: \S+ \|)? number of skipped "
    r"iterations: +(\d) \| number of nan iterations: +0 \|"
)


class Finished(NamedTuple):
    """What a run printed and left behind."""

    code: int
    out: str
    err: str
    folder: Path

    def metrics(self) -> dict[int, dict[str, Any]]:
        """Return iteration -> its figures, but for those of the clock."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        clock = ("step_ms", "tokens_per_second")
        return {
            line["iteration"]: {k: repr(v) for k, v in line.items() if k not in clock}
            for line in lines
        }

    def common(self, iteration: int) -> dict[str, Any]:
        """Return the common part of a checkpoint."""
        path = self.folder / f"iter_{iteration:07d}" / "common.json"
        common: dict[str, Any] = json.loads(path.read_text())
        return common

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights, moments and main weights after the last iteration."""
        path = self.folder / "iter_0000040"
        tensors = {
            key: torch.empty(fact.shape, dtype=fact.dtype)
            for key, fact in stored_tensors(path).items()
            if not key.startswith("rng.")
        }
        read_tensors(path, tensors, None, prefixes=("model.", "optimizer."))
        return tensors


def run(folder: Path, *commands: str) -> list[Finished]:
    """Run several at once, each with its own --save."""
    places = [folder / str(number) for number in range(len(commands))]
    started = [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "pretrain_gpt.py"),
                *FLAGS.split(),
                *flags.split(),
                *("--save", str(place)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags, place in zip(commands, places, strict=True)
    ]
    ended = [process.communicate(timeout=300) for process in started]
    return [
        Finished(process.returncode, out, err, place)
        for process, (out, err), place in zip(started, ended, places, strict=True)
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    (done,) = run(tmp_path_factory.mktemp("unbroken"), f"{WINDOW} --save-interval 8")
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def resumed(unbroken: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    load = f"{WINDOW} --load {unbroken.folder} --ckpt-step"
    flags = {
        "searching": f"{load} {SEARCHING}",
        "found": f"{load} {FOUND}",
    }
    done = run(tmp_path_factory.mktemp("resumed"), *flags.values())
    assert [one.code for one in done] == [0] * len(done), done[0].err
    return dict(zip(flags, done, strict=True))


def test_the_log_shows_the_scale_and_the_skipped_steps(unbroken: Finished) -> None:
    found = {int(i): (float(s), int(n)) for i, s, _, n in LINE.findall(unbroken.out)}
    assert sorted(found) == list(range(1, 41))
    skipped = [i for i, (_, count) in found.items() if count]
    assert len(skipped) >= 14
    first = min(set(found) - set(skipped))
    assert skipped[: first - 1] == list(range(1, first))
    falls = [2.0**32 / 2 ** max(0, i - 1) for i in range(1, first)]  # hysteresis 2: not the first
    assert [found[i][0] for i in range(1, first)] == falls
    text = "iteration 2: the gradient is too large for fp16 and this loss scale: the update is"
    assert f"{text} skipped, the next loss scale is 2147483648.0" in unbroken.out
    assert "not finite" not in unbroken.out + unbroken.err
    metrics = unbroken.metrics()
    assert {i: float(line["loss_scale"]) for i, line in metrics.items()} == {
        i: scale for i, (scale, _) in found.items()
    }
    assert [i for i, line in metrics.items() if line["updated"] == "False"] == skipped


def test_a_checkpoint_holds_the_state_of_the_scale(unbroken: Finished) -> None:
    early, late = unbroken.common(SEARCHING), unbroken.common(FOUND)
    assert early["loss_scale"] == {
        "scale": 2.0 ** (32 - SEARCHING + 1),
        "growth_tracker": 0,
        "hysteresis_tracker": 0,
    }
    assert early["optimizer"]["step_count"] == 0
    assert late["loss_scale"]["scale"] == float(unbroken.metrics()[FOUND]["loss_scale"])
    assert late["loss_scale"]["growth_tracker"] > 0


@pytest.mark.slow  # in one process in tests/parity/test_fp16.py
@pytest.mark.parametrize(("name", "iteration"), [("searching", SEARCHING), ("found", FOUND)])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    unbroken: Finished, resumed: dict[str, Finished], name: str, iteration: int
) -> None:
    metrics, wanted = resumed[name].metrics(), unbroken.metrics()
    assert sorted(metrics) == list(range(iteration + 1, 41))
    for step, line in metrics.items():
        assert line == wanted[step], f"iteration {step}"
    one, other = resumed[name].common(40), unbroken.common(40)
    assert {k: v for k, v in one.items() if k != "config"} == {
        k: v for k, v in other.items() if k != "config"
    }
    expected = unbroken.tensors()
    assert any(key.startswith("optimizer.main_param") for key in expected)
    for key, tensor in resumed[name].tensors().items():
        assert torch.equal(tensor, expected[key]), key


def test_a_model_trained_in_fp16_can_be_used(unbroken: Finished) -> None:
    try:
        trained = load_trained_model(unbroken.folder)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # tests that fork ranks must find none
    assert {param.dtype for param in trained.model.parameters()} == {torch.float16}
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        logits = trained.model(ids, ids)
    assert logits.isfinite().all()


@pytest.mark.slow
def test_gradients_that_no_scale_mends_end_the_run(tmp_path: Path) -> None:
    smallest, constant = run(
        tmp_path, f"--initial-loss-scale {2**31} --min-loss-scale {2**29}", "--loss-scale 1e12"
    )
    for done in (smallest, constant):
        assert done.code == 2, done.err
        assert not list(done.folder.glob("iter_*"))
    # three lower the scale, or use up the hysteresis: they do not count
    assert "the last 10 updates, up to iteration 13, were all skipped" in smallest.err
    assert "less than --min-loss-scale 5.36871e+08" in smallest.err
    assert smallest.out.count("too large for fp16 and this loss scale") == 3
    assert "the last 10 updates, up to iteration 10, were all skipped" in constant.err
    assert "less than --loss-scale 1e+12 or without it" in constant.err
    assert "the gradient is not finite in" in constant.out
