"""From a folder of Hugging Face's through training on two ranks to another one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hf_cases import CASES, VOCAB
from tests.helpers.hf_tiny import tiny_folder

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]


def test_a_run_that_begins_and_ends_at_hugging_face(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "theirs", "mixtral")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    words = (
        f"--load {source} --use-checkpoint-args --mock-data --tokenizer-type NullTokenizer "
        f"--vocab-size {VOCAB - 1} --seq-length 24 --train-iters 2 --lr 0.01 --eval-iters 0 "
        "--micro-batch-size 1 --global-batch-size 2 --expert-model-parallel-size 2 "
        f"--save {tmp_path / 'ours'} --save-hf {tmp_path / 'trained'} --device cpu"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, str(ROOT / "pretrain_gpt.py"), *words.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "as Hugging Face has it (mixtral, " in run.stdout + run.stderr
    from safetensors.torch import load_file

    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "trained/model.safetensors")
    assert {key: tensor.shape for key, tensor in after.items()} == {
        key: tensor.shape for key, tensor in before.items()
    }
    assert all(not tensor.equal(before[key]) for key, tensor in after.items() if "norm" in key)
    config = json.loads((tmp_path / "trained/config.json").read_text())
    for field in ("vocab_size", "eos_token_id"):
        assert config[field] == CASES["mixtral"].config[field]
    assert "0.5" in (tmp_path / "trained/generation_config.json").read_text()
