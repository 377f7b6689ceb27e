"""SIGKILL of one rank under torchrun: the next start goes on from the newest copy of its node."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 4 "
    "--seq-length 32 --vocab-size 127 --tokenizer-type NullTokenizer --hidden-dropout 0.2 "
    "--expert-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 "
    "--lr-decay-style constant --log-interval 20 --eval-iters 0 --device cpu --num-workers 0 "
    "--train-iters 60"
)


def start(flags: str, log: Path) -> subprocess.Popen[bytes]:
    free = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3"
    words = [sys.executable, *launcher.split(), str(ROOT / "pretrain_gpt.py"), *FLAGS.split()]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*words, *flags.split()],
            env=free | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: (line["lm_loss"], line["grad_norm"]) for line in lines}


def last_rank(launcher: int) -> int:
    """Return the process id of the youngest child of torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return max(map(int, children))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["global", "local", "in_memory"])
def test_a_killed_rank_costs_the_steps_since_the_newest_copy(tmp_path: Path, kind: str) -> None:
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert start(f"--save {whole}", tmp_path / "whole.log").wait(timeout=300) == 0
    disk = f"--non-persistent-local-ckpt-dir {tmp_path}/disk" if kind == "local" else ""
    process = start(
        f"--save {run} --load {run} --allow-fresh-start --non-persistent-save-interval 5 "
        f"--non-persistent-ckpt-type {kind} {disk}",
        log,
    )
    metrics = run / "metrics.jsonl"
    while process.poll() is None and (
        not metrics.is_file() or '"iteration": 17,' not in metrics.read_text()
    ):
        time.sleep(0.01)
    os.kill(last_rank(process.pid), signal.SIGKILL)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert f"the {kind} checkpoint of iteration " in text
    assert "is taken, since it is newer than iteration 0 of --load" in text
    assert losses(run) == losses(whole)
    assert sorted(losses(run)) == list(range(1, 61))
