"""A run that takes its options from a checkpoint is the run that saved it, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def train(flags: str) -> str:
    free = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *OF_THE_RUN.split(), *flags.split()],
        env=free | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
