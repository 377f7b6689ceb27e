"""``pretrain_gpt.py --dry-run`` as a user calls it: report, figures, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from tests.functional.bad_input import GOOD

ROOT = Path(__file__).parents[2]
MODEL = (
    "--mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 8 "
    "--moe-router-topk 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3"
)
LAYOUT = "--dry-run-world-size 4 --expert-model-parallel-size 2 --tensor-model-parallel-size 2"


def _dry_run(flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    free = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "pretrain_gpt.py"),
            *MODEL.split(),
            "--dry-run",
            *flags.split(),
        ],
        env=free | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_dry_run_shows_ranks_model_memory_and_communication(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    done = _dry_run(f"{LAYOUT} --dry-run-memory-gib 1 --dry-run-json {target}", WORLD_SIZE="1")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "dense grid   tp 2 x cp 1 x dp 2 x pp 1" in out
    assert "expert grid  etp 2 x ep 2 x edp 1 x pp 1" in out
    assert "no deadlock: every rank comes to the end of the step" in out
    assert "fits into it" in out
    assert max(map(len, out.splitlines())) <= 120
    figures = json.loads(target.read_text())
    assert figures["deadlock"] is None
    assert len(figures["ranks"]) == 4
    hidden, ffn, vocab, positions = 32, 128, 8192, 32  # of --mock-data
    attention = 4 * hidden * hidden + 4 * hidden
    experts = 8 * (2 * hidden * ffn + ffn + hidden)
    layer = attention + experts + 8 * hidden + 2 * 2 * hidden
    assert figures["parameters"]["experts"] == 2 * experts
    assert figures["parameters"]["whole"] == ((vocab + positions) * hidden + 2 * layer + 2 * hidden)
    memory = figures["ranks"][3]["memory_bytes"]
    assert memory["gradients"] == memory["weights"]
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"], rel=0.01)  # two moments


def test_a_run_that_does_not_fit_ends_with_code_1() -> None:
    done = _dry_run("--num-layers 1 --global-batch-size 2 --dry-run-memory-gib 0.001")
    assert done.returncode == 1, done.stderr
    assert "GiB does NOT fit into it" in done.stdout


def test_the_world_of_a_dry_run_is_the_one_that_is_asked_for() -> None:
    config = parse_args(f"{GOOD} --dry-run --dry-run-world-size 4".split(), world_size=1)
    assert config.training.global_batch_size == 4 * config.training.micro_batch_size
    line = f"{GOOD} --dry-run --dry-run-world-size 3 --tensor-model-parallel-size 2"
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size 2"):
        parse_args(line.split(), world_size=4)


def test_torchrun_of_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="leave out torchrun and add --dry-run-world-size 4"):
        parse_args(f"{GOOD} --dry-run".split())


def test_a_cap_of_attention_scores_costs_memory_on_cuda_where_windows_cost_none(
    tmp_path: Path,
) -> None:
    activations = []
    for options in ("--softmax-type learnable --window-size 15,0", "--attn-logit-softcapping 30"):
        target = tmp_path / "figures.json"
        done = _dry_run(
            f"--device cuda --bf16 --dry-run-world-size 1 --seq-length 512 --attention-dropout 0 "
            f"--num-layers 1 --dry-run-json {target} {options}"
        )
        assert done.returncode == 0, done.stderr
        figures = json.loads(target.read_text())
        activations.append(figures["ranks"][0]["memory_bytes"]["activations"])
    weights = 2 * 2 * 512 * (512 / 2) * 2  # samples, heads, queries, keys, bytes of bf16
    assert activations[1] - activations[0] > weights / 2


def test_a_dry_run_knows_latent_attention(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    latents = (
        "--multi-latent-attention --q-lora-rank 12 --kv-lora-rank 8 --qk-head-dim 6 "
        "--qk-pos-emb-head-dim 4 --v-head-dim 5 --normalization RMSNorm --disable-bias-linear"
    )
    done = _dry_run(f"{LAYOUT} --sequence-parallel {latents} --dry-run-json {target}")
    assert done.returncode == 0, done.stderr
    assert "no deadlock: every rank comes to the end of the step" in done.stdout
    figures = json.loads(target.read_text())
    hidden, heads, vocab = 32, 2, 8192
    queries = hidden * 12 + 12 + 12 * heads * (6 + 4)
    latent = hidden * (8 + 4) + 8 + 8 * heads * (6 + 5)
    attention = queries + latent + heads * 5 * hidden
    experts = 8 * 2 * hidden * 4 * hidden
    layer = attention + experts + 8 * hidden + 2 * hidden
    assert figures["parameters"]["whole"] == vocab * hidden + 2 * layer + hidden


def test_experts_in_fp32_are_planned_for_a_gpu() -> None:
    """torch's grouped product knows only bf16 where there is no data; a run multiplies fp32 too."""
    done = _dry_run("--device cuda --dry-run-world-size 1")
    assert done.returncode == 0, done.stderr
    assert "DRY RUN as on cuda" in done.stdout
