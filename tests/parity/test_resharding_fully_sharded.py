"""Checkpoints of fully sharded runs hold what those of any other layout hold, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors
from megatron.core.distributed.replica_check import ReplicaError, check_replicas
from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    TorchFullyShardedDataParallel,
)
from megatron.training.checkpoint_model import load_trained_model
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.evaluate import evaluate
from megatron.training.run import Run, TrainState
from tests.helpers.layouts import make_config, make_run, microbatches
from tests.helpers.ranks import run_ranks
from tests.helpers.train_steps import train_steps
from tools.layouts.sharded_blocks import sharded_main_weights
from tools.layouts.whole_tensors import Blocks, whole_of_ranks

COMMON: dict[str, Any] = {
    "optimizer": "adam",
    "micro_batch_size": 1,
    "global_batch_size": 12,  # over 1, 2, 3 or 4 ranks
    "clip_grad": 0.1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 20,
}
FORMATS: dict[str, dict[str, Any]] = {"fp64": {}, "bf16": {"fp64": False, "bf16": True}}
FSDP, ZERO1 = {"use_torch_fsdp2": True}, {"use_distributed_optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sharded 4, ep 2": (4, FSDP | {"expert_model_parallel_size": 2}),
    "sharded 3": (3, FSDP),  # shards of no equal size; experts along another dimension
    "sharded 2": (2, FSDP | {"expert_model_parallel_size": 2}),
    "sharded 1": (1, FSDP),
    "plain 2": (2, {"expert_model_parallel_size": 2}),
    "zero-1 2": (2, ZERO1),
}
SOURCES = ["sharded 4, ep 2", "sharded 3", "plain 2", "zero-1 2"]


def _save(folder: str, run: Run, state: TrainState) -> None:
    saved = save_checkpoint(
        folder, state, config=run.config, model=run.model, optimizer=run.optimizer
    )
    assert saved.path is not None, saved.error


def _load(folder: str, run: Run) -> TrainState:
    loaded = load_checkpoint(folder, config=run.config, model=run.model, optimizer=run.optimizer)
    return loaded.state()


def _train_and_save(folder: str, options: dict[str, Any]) -> None:
    run, state = make_run(make_config(**options)), TrainState()
    train_steps(run, state, 2)
    evaluate(run, microbatches(run, 64), 1)  # leaves what a forward gathers last
    _save(folder, run, state)


def _copy(source: str, folder: str, options: dict[str, Any]) -> None:
    """Load a checkpoint on this layout and save it again."""
    run = make_run(make_config(**options))
    state = _load(source, run)
    assert run.optimizer.step_count == 2
    _save(folder, run, state)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return all of model and optimizer that a checkpoint holds."""
    path = folder / "iter_0000002"
    kinds = ("model.", "optimizer.")
    facts = {k: v for k, v in stored_tensors(path).items() if k.startswith(kinds)}
    tensors = {key: torch.empty(fact.shape, dtype=fact.dtype) for key, fact in facts.items()}
    read_tensors(path, tensors, None, prefixes=kinds)
    return tensors


QUICK = [("fp64", "sharded 4, ep 2", "plain 2"), ("bf16", "zero-1 2", "sharded 3")]
ALL = [(kind, a, b) for kind in FORMATS for a in SOURCES for b in LAYOUTS]
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in QUICK]


@pytest.mark.parametrize(("kind", "source", "target"), [*QUICK, *SLOW])
def test_a_checkpoint_goes_through_another_layout_unchanged(
    tmp_path: Path, kind: str, source: str, target: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for (ranks, sizes), body, folders in (
        (LAYOUTS[source], _train_and_save, (first,)),
        (LAYOUTS[target], _copy, (first, second)),
    ):
        run_ranks(body, ranks, *map(str, folders), COMMON | FORMATS[kind] | sizes)
    want, got = tensors_in(first), tensors_in(second)
    assert want.keys() == got.keys()
    moments = [key for key in want if ".exp_avg." in key]
    assert moments
    assert all(want[key].abs().max() > 0 for key in moments if "experts" not in key)
    assert (kind == "bf16") == any(key.startswith("optimizer.main_param.") for key in want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), key


def _blocks(run: Run) -> Blocks:
    assert isinstance(run.model, TorchFullyShardedDataParallel)
    return sharded_main_weights(run.model)


def _goes_on(folder: str, options: dict[str, Any]) -> None:
    run, state = make_run(make_config(**options)), TrainState(dropout_seed=7)
    train_steps(run, state, 2)
    _save(folder, run, state)
    want = train_steps(run, state, 2)
    other = make_run(run.config)
    assert train_steps(other, _load(folder, other), 2) == want
    for mine, theirs in zip(_blocks(run), _blocks(other), strict=True):
        assert mine.name == theirs.name
        assert torch.equal(mine.tensor, theirs.tensor), mine.name


@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp64", marks=pytest.mark.slow)])
def test_a_run_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    run_ranks(_goes_on, 2, str(tmp_path), COMMON | FORMATS[kind] | FSDP)


def _weights_alone(folder: str, options: dict[str, Any]) -> None:
    run = make_run(make_config(**options, no_load_optim=True))
    _load(folder, run)
    torch.save(_blocks(run), Path(folder) / f"{dist.get_rank()}.pt")


@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp64", marks=pytest.mark.slow)])
def test_weights_without_the_optimizer_become_main_weights(tmp_path: Path, kind: str) -> None:
    options = COMMON | FORMATS[kind] | FSDP
    run_ranks(_train_and_save, 2, str(tmp_path), options)
    run_ranks(_weights_alone, 2, str(tmp_path), options)
    saved = tensors_in(tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for key, weight in whole_of_ranks(ranks).items():
        assert torch.equal(weight, stored(saved, "model." + key).to(weight.dtype)), key


def stored(saved: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Return a logical tensor as the model has it: gate and up one behind the other."""
    if key in saved:
        return saved[key]
    head, _, tail = key.rpartition(".")
    return torch.cat([saved[f"{head}.{half}.{tail}"] for half in ("gate", "up")])


def _look(folder: str) -> None:
    model = load_trained_model(Path(folder)).model
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    torch.save(weights, Path(folder) / "used.pt")


def test_a_model_to_generate_with_is_read_from_it(tmp_path: Path) -> None:
    ranks, sizes = LAYOUTS["sharded 4, ep 2"]
    run_ranks(_train_and_save, ranks, str(tmp_path), COMMON | sizes)
    run_ranks(_look, 1, str(tmp_path))
    used, saved = torch.load(tmp_path / "used.pt"), tensors_in(tmp_path)
    name = "embedding.word_embeddings.weight"
    assert torch.equal(used[name], saved["model." + name])
    experts = used["decoder.layers.1.mlp.experts.weight1"]
    for number, expert in enumerate(experts):
        key = f"model.decoder.layers.1.mlp.experts.local_experts.{number}.linear_fc1.weight"
        assert torch.equal(expert, stored(saved, key)), key


def _checked(options: dict[str, Any]) -> None:
    run = make_run(make_config(**options))
    train_steps(run, TrainState(), 1)
    check_replicas(run.model, iteration=1)
    biases = [b for name, b in run.model.module.named_buffers() if name.endswith("expert_bias")]
    if dist.get_rank() == 1:
        biases[0][0] += 1.0
    with pytest.raises(ReplicaError, match=r"expert_bias on rank 1"):
        check_replicas(run.model, iteration=1)
    narrow = 8 if dist.get_rank() == 1 else 16
    other = make_run(make_config(**(options | {"hidden_size": narrow, "ffn_hidden_size": 24})))
    with pytest.raises(ReplicaError, match="models of different shapes"):
        check_replicas(other.model)


def test_replicas_of_what_is_not_sharded_are_compared() -> None:
    run_ranks(_checked, 2, COMMON | FSDP)
