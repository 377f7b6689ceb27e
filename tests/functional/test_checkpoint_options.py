"""A run that takes its options from a checkpoint is the run that saved it, to the bit."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.core.dist_checkpointing.folders import complete_iterations

ROOT = Path(__file__).parents[2]
OF_THE_RUN = (
    "--mock-data --micro-batch-size 2 --global-batch-size 4 --train-iters 6 --log-interval 1 "
    "--eval-iters 1 --device cpu --num-workers 0"
)
OF_THE_MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --num-experts 4 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01 --hidden-dropout 0.2 "
    "--seq-length 24 --tokenizer-type ByteTokenizer"
)
OF_THE_SCHEDULE = "--lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2"


def start(flags: str) -> subprocess.Popen[str]:
    free = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *OF_THE_RUN.split(), *flags.split()],
        env=free | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(flags: str) -> str:
    process = start(flags)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]
    return out


def steps(folder: Path) -> dict[int, dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clock = ("step_ms", "tokens_per_second")
    return {line["iteration"]: {k: v for k, v in line.items() if k not in clock} for line in lines}


def test_a_run_with_the_options_of_its_checkpoint_is_the_unbroken_run(tmp_path: Path) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(
        f"{OF_THE_MODEL} {OF_THE_SCHEDULE} --save {whole} --save-interval 1 "
        "--save-retain-interval 3"
    )
    assert complete_iterations(whole) == [3, 6]
    out = train(
        f"--load {whole} --ckpt-step 3 --save {rest} --lr 0.5 --use-checkpoint-args "
        "--use-checkpoint-opt_param-scheduler"
    )
    assert f"--use-checkpoint-args: taken from {whole}/iter_0000003: --num-layers 2" in out
    assert "--lr 0.01 (not 0.5)" in out
    unbroken, resumed = steps(whole), steps(rest)
    assert sorted(resumed) == [4, 5, 6]
    assert all(resumed[iteration] == unbroken[iteration] for iteration in resumed)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_memory(tmp_path: Path) -> None:
    save = tmp_path / "run"
    flags = (
        f"{OF_THE_MODEL} {OF_THE_SCHEDULE} --train-iters 60 --save {save} --load {save} "
        "--allow-fresh-start --non-persistent-save-interval 4 --non-persistent-ckpt-type in_memory"
    )
    process = start(flags)
    metrics = save / "metrics.jsonl"
    while process.poll() is None and (
        not metrics.is_file() or '"iteration": 7' not in metrics.read_text()
    ):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    text = metrics.read_text()
    metrics.write_text(text[: text.rindex("\n") + 1])  # a line that was cut short
    before = steps(save)
    out = train(flags)
    (line,) = [line for line in out.splitlines() if "the in_memory checkpoint of iteration" in line]
    begin = int(line.split("iteration ")[1].split()[0])
    assert begin >= 4
    assert begin % 4 == 0
    after = steps(save)
    again = [iteration for iteration in before if iteration > begin]
    assert max(before) - begin < 8
    assert all(before[iteration] == after[iteration] for iteration in again)
    assert complete_iterations(save) == [60]
    assert not list(Path("/dev/shm").glob(f"megatron-{os.getuid()}-run-{mark_of(save)}*"))


def mark_of(save: Path) -> str:
    return hashlib.sha256(str(save.resolve()).encode()).hexdigest()[:12]
