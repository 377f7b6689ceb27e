"""The loss scale is saved and read with the optimizer, and only with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.errors import CheckpointError
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, GradScaler
from megatron.training.checkpoint_state import LoadedState, TrainState
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.config.run_config import RunConfig
from tests.unit_tests.core.dist_checkpointing.stand_in import build

FRESH = {"scale": 2.0**32, "growth_tracker": 0, "hysteresis_tracker": 2}
SAVED = {"scale": 2.0**31, "growth_tracker": 3, "hysteresis_tracker": 0}


def dynamic() -> DynamicGradScaler:
    return DynamicGradScaler(2.0**32, min_scale=1.0, growth_interval=1000, hysteresis=2)


def moved() -> DynamicGradScaler:
    made = dynamic()
    for step in "xx...":
        made.update(found_inf=step == "x")
    return made


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A world of one rank, gone afterwards: tests that fork ranks must find none."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(**options: Any) -> RunConfig:
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_moe_experts": 4}
    lengths = {"lr": 1e-3, "train_iters": 10, "lr_decay_iters": 10, "global_batch_size": 8}
    return RunConfig.from_flat(shape | lengths | {"fp16": True} | options)


def save(folder: Path, scaler: GradScaler, **options: Any) -> Any:
    """Save, and return what the checkpoint says of the loss scale."""
    model, optimizer = build(1, torch.float16)
    optimizer.grad_scaler = scaler
    result = save_checkpoint(
        folder,
        TrainState(iteration=5, consumed_samples=40, dropout_seed=1),
        config=config(**options),
        model=model,
        optimizer=optimizer,
    )
    assert result.path is not None, result.error
    return json.loads((result.path / "common.json").read_text())["loss_scale"]


def load(folder: Path, scaler: GradScaler, **options: Any) -> LoadedState:
    model, optimizer = build(1, torch.float16)
    optimizer.grad_scaler = scaler
    return load_checkpoint(folder, config=config(**options), model=model, optimizer=optimizer)


def test_a_dynamic_scale_goes_on_where_it_was(tmp_path: Path) -> None:
    assert save(tmp_path, moved()) == SAVED
    scaler = dynamic()
    load(tmp_path, scaler)
    assert scaler.state_dict() == SAVED


@pytest.mark.parametrize("option", ["no_load_optim", "finetune"])
def test_without_the_optimizer_the_search_starts_anew(tmp_path: Path, option: str) -> None:
    save(tmp_path, moved())
    scaler = dynamic()
    load(tmp_path, scaler, **{option: True})
    assert scaler.state_dict() == FRESH


def test_no_save_optim_saves_no_scale(tmp_path: Path) -> None:
    assert save(tmp_path, moved(), no_save_optim=True) is None


def test_a_constant_scale_is_that_of_this_run(tmp_path: Path) -> None:
    assert save(tmp_path, moved()) == SAVED
    scaler = ConstantGradScaler(64.0)
    state = load(tmp_path, scaler, loss_scale=64.0)
    assert scaler.scale == 64.0
    assert state.notices == ("changed since the checkpoint: --loss-scale was None and now is 64.0",)


def test_a_dynamic_scale_after_a_constant_one_is_searched(tmp_path: Path) -> None:
    assert save(tmp_path, ConstantGradScaler(64.0), loss_scale=64.0) is None
    scaler = dynamic()
    load(tmp_path, scaler)
    assert scaler.state_dict() == FRESH


def test_another_number_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, moved())
    with pytest.raises(CheckpointError, match=r"number format \(--bf16, --fp16, --fp64\)"):
        load(tmp_path, dynamic(), fp16=False, bf16=True)
