"""Upcycled models against their dense sources: receipts at rounding, and runs of several ranks."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.layer_homes import stages_of_rank
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.config.run_config import RunConfig
from megatron.training.evaluate import evaluate
from megatron.training.initialize import World
from megatron.training.run import Run, TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import train_step
from megatron.training.upcycling.online import after_upcycling
from tests.helpers.ranks import run_ranks
from tests.helpers.small_runs import alone_in_the_world, save, steps
from tests.unit_tests.training.tiny_run import (
    FLAGS,
    SEQ,
    gradients,
    plain_forward_step,
    tiny_batches,
)
from tools.upcycling.dense_models import FAMILIES, save_dense
from tools.upcycling.proof import Case, cases, proved

QUICK = {
    "gpt2": Case(granularity=2, copies=2, score="softmax over all"),
    "llama": Case(granularity=2, copies=1, score="softmax", fold=True),
    "qwen2": Case(granularity=1, copies=1, score="sigmoid"),
    "qwen3": Case(granularity=1, copies=2, score="softmax"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_receipt_is_at_rounding(family, tmp_path) -> None:
    with alone_in_the_world():
        save_dense(tmp_path / "dense", family, "--num-layers 2")
        receipt = proved(tmp_path / "dense", tmp_path / "moe", QUICK[family])
    assert receipt.kept, receipt.table()
    assert receipt.kl_divergence < 1e-10
    assert abs(receipt.perplexity_after / receipt.perplexity_before - 1) < 1e-6
    assert receipt.busiest_expert < 7.5, "not all tokens go to one of the 8 experts"


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases()), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_receipt_is_at_rounding(family, case, tmp_path) -> None:
    with alone_in_the_world():
        save_dense(tmp_path / "dense", family)
        receipt = proved(tmp_path / "dense", tmp_path / "moe", case)
    assert receipt.kept, receipt.table()
    assert receipt.kl_divergence < 1e-10


SHAPE = "--num-layers 4 --swiglu --num-attention-heads 4 --ffn-hidden-size 48"
DENSE = re.sub(r"--(num-experts|moe-\S+) \S+", "", FLAGS) + f" {SHAPE}"
MOE = (
    f"{SHAPE} --num-experts 8 --moe-router-topk 4 --moe-ffn-hidden-size 24 "
    "--moe-layer-freq ([0]+[1]*3)"
)
LAYOUTS = {
    "ep2": "--expert-model-parallel-size 2",
    "tp2_ep2": "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1 --padded-vocab-size 128",
    "pp2": "--pipeline-model-parallel-size 2",
}


def _model(config: RunConfig, groups: ProcessGroupCollection) -> GPTModel:
    return GPTModel(
        config.model,
        get_gpt_decoder_block_spec(config.model),
        vocab_size=config.tokenizer.padded_vocab_size,
        max_sequence_length=SEQ,
        pg_collection=groups,
        stages=stages_of_rank(config.model, groups.pp.rank()),
    )


def _run(line: str) -> Run:
    """Build a run on the ranks that are there."""
    ranks = dist.get_world_size()
    config = parse_args(line.split(), world_size=ranks)
    world = World(
        rank=dist.get_rank(),
        world_size=ranks,
        device=torch.device("cpu"),
        pg_collection=ProcessGroupCollection.create(config.model.layout(ranks)),
    )
    return setup_run(config, world, _model, plain_forward_step)


def _loss(run: Run) -> float:
    run.model.eval()
    return evaluate(run, tiny_batches(run), 1)


def _online(config: RunConfig, dense: Path, own: Path) -> RunConfig:
    options = replace(
        config.checkpoint,
        load=str(dense),
        save=str(own),
        moe_use_upcycling=True,
        moe_upcycling_granularity=2,
    )
    return replace(config, checkpoint=options)


def _upcycle_on_ranks(layout: str, dense: Path, own: Path, want: float) -> None:
    """The loss is that of the dense model, at once and when the run goes on from its own."""
    run = _run(f"{FLAGS} {MOE} {LAYOUTS[layout]}")
    config = after_upcycling(_online(run.config, dense, own), dist.group.WORLD)
    assert config.checkpoint.load == str(own)
    state = load_checkpoint(own, config=config, model=run.model, optimizer=run.optimizer)
    assert state.iteration == 0
    assert state.path == own / "iter_0000000"
    assert _loss(run) == pytest.approx(want, rel=1e-12)
    again = _run(f"{FLAGS} {MOE} {LAYOUTS[layout]} --load {own}")  # as a later start says it
    state = load_checkpoint(own, config=again.config, model=again.model, optimizer=again.optimizer)
    assert (state.iteration, state.path) == (0, own / "iter_0000000")
    assert _loss(again) == _loss(run)


def _save_dense(folder: Path) -> float:
    """Save a dense run after two steps, moments too, and return the loss that it then has."""
    run = _run(DENSE)
    steps(run, 2)
    save(folder, run, 2)
    return _loss(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_ranks_begins_with_the_loss_of_the_dense_model(layout, tmp_path) -> None:
    with alone_in_the_world():
        want = _save_dense(tmp_path / "dense")
    ranks = 4 if layout == "tp2_ep2" else 2
    run_ranks(_upcycle_on_ranks, ranks, layout, tmp_path / "dense", tmp_path / "own", want)


NO_LOSS = "--moe-z-loss-coeff 0 --clip-grad 0"
EXPERT = re.compile(r"(.*mlp)\.experts\.local_experts\.(\d+)\.(.*)")


def _summed(found: dict[str, Tensor], granularity: int) -> dict[str, Tensor]:
    """Add up gradients of copies, put those of slices side by side: as the dense MLP has them."""
    summed: dict[str, Tensor] = {}
    slices: dict[str, list[Tensor]] = {}
    for key, gradient in found.items():
        match = EXPERT.fullmatch(key)
        if match is None:
            summed[key] = gradient
            continue
        parts = slices.setdefault(f"{match[1]}.{match[3]}", [torch.zeros(())] * granularity)
        parts[int(match[2]) % granularity] = parts[int(match[2]) % granularity] + gradient
    for key, parts in slices.items():
        if key.endswith("linear_fc2.bias"):  # each slice has a part of it
            summed[key] = torch.stack(parts).mean(dim=0)
        elif "linear_fc2" in key:
            summed[key] = torch.cat(parts, dim=1)
        else:  # gate and up, one behind the other
            halves = zip(*(part.chunk(2) for part in parts), strict=True)
            summed[key] = torch.cat([torch.cat(half) for half in halves])
    return {key: gradient for key, gradient in summed.items() if "router" not in key}


@pytest.mark.parametrize("score", ["", "--moe-router-score-function sigmoid"], ids=["soft", "sig"])
def test_gradients_of_the_copies_add_up_to_those_of_the_mlp(score, tmp_path) -> None:
    with alone_in_the_world():
        _save_dense(tmp_path / "dense")
        line = f"{DENSE} --clip-grad 0 --load {tmp_path}/dense --finetune"
        run = _run(line)
        load_checkpoint(
            tmp_path / "dense", config=run.config, model=run.model, optimizer=run.optimizer
        )
        train_step(run, TrainState(), tiny_batches(run))
        want = gradients(run)
        line = f"{FLAGS} {MOE} {NO_LOSS} {score} --moe-router-topk-scaling-factor 2"
        run = _run(line)
        config = after_upcycling(_online(run.config, tmp_path / "dense", tmp_path / "own"), None)
        load_checkpoint(tmp_path / "own", config=config, model=run.model, optimizer=run.optimizer)
        train_step(run, TrainState(), tiny_batches(run))
        got = _summed(gradients(run), 2)
    assert got.keys() == want.keys()
    for key, gradient in got.items():
        scale = want[key].abs().max()
        torch.testing.assert_close(gradient, want[key], rtol=0, atol=1e-12 * float(scale), msg=key)
