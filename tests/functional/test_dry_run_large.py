"""A model of DeepSeek-V3's shape on 128 and 1,024 ranks: counts equal a hand count."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.training.arguments import parse_args
from megatron.training.dry_run.census import Census, take_census
from megatron.training.dry_run.rank_groups import GroupTable
from megatron.training.dry_run.stand_ins import even_logits
from pretrain_gpt import model_provider
from tests.helpers.processes import child_seconds

ROOT = Path(__file__).parents[2]
HIDDEN, VOCAB, LAYERS, DENSE = 7168, 129_280, 61, 3
QUERIES, FFN, EXPERT_FFN, EXPERTS = 128 * 128, 18432, 2048, 256
TP, PP = 2, 8
LAYERS_OF_STAGE = (7, 8, 8, 8, 8, 8, 8, 6)
MODEL = (  # the end of a document is one more word
    f"--mock-data --vocab-size {VOCAB - 1} --num-layers {LAYERS} --hidden-size {HIDDEN} "
    f"--ffn-hidden-size {FFN} --num-attention-heads 128 --kv-channels 128 --swiglu "
    "--disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
    f"--num-experts {EXPERTS} --moe-router-topk 8 --moe-ffn-hidden-size {EXPERT_FFN} "
    f"--moe-shared-expert-intermediate-size {EXPERT_FFN} --moe-layer-freq ([0]*3+[1]*58) "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --bf16 "
    f"--tensor-model-parallel-size {TP} --sequence-parallel --expert-tensor-parallel-size 1 "
    f"--pipeline-model-parallel-size {PP} --decoder-first-pipeline-num-layers 7 "
    "--decoder-last-pipeline-num-layers 6 --seq-length 4096 --max-position-embeddings 4096 "
    "--micro-batch-size 1 --lr 1e-4 --use-distributed-optimizer --device cuda --dry-run "
)

ATTENTION = HIDDEN * 3 * QUERIES + QUERIES * HIDDEN
ONE_EXPERT = 3 * HIDDEN * EXPERT_FFN
NORMS = 2 * HIDDEN
ROUTER = EXPERTS * HIDDEN


def whole_model() -> int:
    """Count the parameters by hand."""
    dense = ATTENTION + 3 * HIDDEN * FFN + NORMS
    moe = ATTENTION + EXPERTS * ONE_EXPERT + ONE_EXPERT + ROUTER + NORMS
    return DENSE * dense + (LAYERS - DENSE) * moe + HIDDEN + 2 * VOCAB * HIDDEN


def of_rank(stage: int, ep: int) -> int:
    """Count the parameters of a rank by hand: slices over 2, experts over ``ep``."""
    moe_layer = ATTENTION // TP + EXPERTS // ep * ONE_EXPERT + ONE_EXPERT // TP + ROUTER + NORMS
    dense = DENSE if stage == 0 else 0
    count = (LAYERS_OF_STAGE[stage] - dense) * moe_layer
    count += dense * ((ATTENTION + 3 * HIDDEN * FFN) // TP + NORMS)
    ends = VOCAB * HIDDEN // TP if stage in (0, PP - 1) else 0
    return count + ends + (HIDDEN if stage == PP - 1 else 0)


def test_ranks_of_experts_get_equal_rows_where_experts_cannot() -> None:
    """DeepSeek-V2: 4096 tokens with 6 of 160 experts each, 20 of them a rank."""
    chosen = even_logits(4096, 160, 6, torch.float32, expert_ranks=8) > 0
    assert (chosen.sum(1) == 6).all()
    assert chosen.unflatten(1, (8, 20)).sum((0, 2)).tolist() == [3072] * 8
    per_expert = chosen.sum(0)
    assert int(per_expert.max() - per_expert.min()) <= 8
    even = even_logits(4096, 64, 8, torch.float32, expert_ranks=8) > 0
    assert even.sum(0).tolist() == [512] * 64


def _census(world_size: int, ep: int) -> Census:
    line = (
        f"{MODEL} --dry-run-world-size {world_size} --expert-model-parallel-size {ep} "
        f"--global-batch-size {world_size}"
    )
    config = parse_args(line.split())
    table = GroupTable(config.model.layout(world_size))
    return take_census(config, model_provider, table)


def _check(census: Census, ep: int) -> None:
    assert census.whole.params == whole_model()
    assert census.whole.expert_params == (LAYERS - DENSE) * EXPERTS * ONE_EXPERT
    idle = (LAYERS - DENSE) * (EXPERTS - 8) * ONE_EXPERT
    assert census.whole.active_params == whole_model() - idle
    assert census.whole.missing == ()
    share = len(census.ranks) // PP
    for model in census.ranks:
        stage = model.rank // share
        assert len(model.layers) == LAYERS_OF_STAGE[stage]
        assert model.params == of_rank(stage, ep)


def test_parameters_of_128_ranks_equal_a_hand_count() -> None:
    _check(_census(128, ep=8), ep=8)


@pytest.mark.slow
def test_1024_ranks_take_a_minute_of_one_core_and_little_memory(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    line = (
        f"{MODEL} --dry-run-world-size 1024 --expert-model-parallel-size 64 "
        f"--global-batch-size 1024 --dry-run-json {target} --dry-run-memory-gib 80"
    )
    before = child_seconds()
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt.py"), *line.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no deadlock" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert child_seconds() - before < 60.0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB
    figures = json.loads(target.read_text())
    assert figures["parameters"]["whole"] == whole_model()
    for rank in (0, 127, 128, 1023):
        model = figures["ranks"][rank]
        count = of_rank(rank // 128, ep=64)
        assert model["dense_params"] + model["expert_params"] == count
        assert model["memory_bytes"]["weights"] == pytest.approx(2 * count, rel=0.01)
        assert model["memory_bytes"]["gradients"] == pytest.approx(4 * count, rel=0.01)
    kept = [figures["ranks"][128 * stage]["memory_bytes"]["activations"] for stage in range(1, 7)]
    assert kept == sorted(kept, reverse=True), "earlier stages keep more microbatches"
