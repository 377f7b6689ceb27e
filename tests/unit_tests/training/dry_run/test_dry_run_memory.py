"""The memory that a dry run tells is that of a real run: ranks over gloo, storages counted."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.moe.router import TopKRouter
from megatron.training.dry_run.recorded_run import MemoryUse, Recipe, record_step
from megatron.training.dry_run.replay import Replay
from megatron.training.dry_run.stand_ins import even_logits
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from pretrain_gpt import forward_step, model_provider
from tests.helpers.layouts import make_config, make_run, microbatches
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.ranks import run_ranks

SIZE: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2}
TP = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 4": {},
    "dp 4 bf16": {"bf16": True, "fp64": False},
    "sgd": {"optimizer": "sgd"},
    "tp 2, dp 2": TP,
    "tp 2 with sp, dp 2": TP | {"sequence_parallel": True},
    "ep 2": {"expert_model_parallel_size": 2},
    "ep 4": {"expert_model_parallel_size": 4},
    "cp 2": {"context_parallel_size": 2},
    "zero 1": {"use_distributed_optimizer": True},
    "pp 2": {
        "pipeline_model_parallel_size": 2,
        "num_layers": 3,
        "decoder_first_pipeline_num_layers": 2,
    },
    "pp 2 in 4 stages": {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
        "num_layers": 4,
    },
    "zero bubble": {
        "pipeline_model_parallel_size": 2,
        "num_layers": 2,
        "pipeline_schedule": "zb-h1",
    },
    "recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
LAYOUTS |= {
    "depths, pp 2": LAYOUTS["pp 2"] | {"mtp_num_layers": 2},
    "depths, recompute": LAYOUTS["recompute"] | {"mtp_num_layers": 2},
}
QUICK = ("tp 2 with sp, dp 2", "pp 2")


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _evenly(choose: Any) -> Any:
    """Route as a dry run supposes; experts that get more rows keep more."""

    def chosen(router: TopKRouter, logits: torch.Tensor, context: Any) -> Any:
        even = even_logits(*logits.shape, router.topk, logits.dtype)
        return choose(router, logits + (even - logits).detach(), context)

    return chosen


def _count_real(folder: Path, options: dict[str, Any]) -> None:
    """Train a step and note the bytes of this rank."""
    run = make_run(make_config(**options))
    weights = _storages([*run.model.parameters(), *run.model.buffers()])
    gradients = _storages([param.main_grad for param in run.model.parameters()])
    known = weights.keys() | gradients.keys()
    state = [p for group in run.optimizer.param_groups for p in group["params"]]
    for entry in run.optimizer._flat_step.optimizer.state.values():
        state += [value for value in entry.values() if isinstance(value, torch.Tensor)]
    rest = {key: size for key, size in _storages(state).items() if key not in known}
    batches = list(microbatches(run, 0))
    chosen = mock.patch.object(TopKRouter, "_choose", _evenly(TopKRouter._choose))
    with chosen, LiveBytes() as live:
        train_step(run, TrainState(dropout_seed=run.config.training.seed), iter(batches))
    use = MemoryUse(*(sum(part.values()) for part in (weights, gradients, rest)), live.peak)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(use._asdict()))


def _planned(options: dict[str, Any], rank: int, replay: Replay | None = None) -> MemoryUse:
    config = make_config(**options)
    recipe = Recipe(
        config=config,
        layout=config.model.layout(4),
        model_provider=model_provider,
        forward_step=forward_step,
        device="cpu",
    )
    return record_step(recipe, recipe.groups(), rank, replay).memory


def _compare(name: str, folder: Path) -> None:
    options = SIZE | LAYOUTS[name]
    run_ranks(_count_real, 4, folder, options)
    for rank in (0, 3):
        real = MemoryUse(**json.loads((folder / f"{rank}.json").read_text()))
        planned = _planned(options, rank)
        assert planned[:3] == real[:3], "weights, gradients and optimizer to the byte"
        assert planned.activations == pytest.approx(real.activations, rel=0.1)


@pytest.mark.parametrize("name", QUICK)
def test_planned_memory_is_that_of_a_real_step(name: str, tmp_path: Path) -> None:
    _compare(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in QUICK])
def test_planned_memory_is_that_of_a_real_step_in_every_layout(name: str, tmp_path: Path) -> None:
    _compare(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("ep 4", 0),
        pytest.param("depths, pp 2", 3, marks=pytest.mark.slow),
        pytest.param("depths, recompute", 0, marks=pytest.mark.slow),
    ],
)
def test_repeated_layers_need_the_memory_of_layers_that_are_run(name: str, rank: int) -> None:
    options = SIZE | LAYOUTS[name]
    run = _planned(options, rank)
    repeated = _planned(options, rank, Replay(by_kind=True))
    assert repeated[:3] == run[:3]
    assert repeated.activations == pytest.approx(run.activations, rel=0.1)
