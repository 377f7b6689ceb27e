"""--pretrained-checkpoint: weights only at the first start, the run's own checkpoint afterwards."""

from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.errors import CheckpointError
from megatron.training.checkpoint_state import LoadedState, TrainState
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.config.run_config import RunConfig
from megatron.training.initialize import Launch
from megatron.training.start_up import start_line
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import build, fill, wrong_keys


def config_of(**options: object) -> RunConfig:
    values = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_moe_experts": 4}
    values |= {"lr": 1e-3, "train_iters": 10, "lr_decay_iters": 10, "global_batch_size": 8}
    return RunConfig.from_flat(values | options)


class Stood:
    """A model and an optimizer without a run around them."""

    def __init__(self) -> None:
        self.model, self.optimizer = build(1, torch.float32)
        self.optimizer.step_count = 3

    def weights(self) -> dict[str, torch.Tensor]:
        return model_tensors(self.model.module)

    def moments(self) -> dict[str, torch.Tensor]:
        return optimizer_tensors(self.optimizer.named_state())

    def save(self, folder: Path, iteration: int) -> None:
        fill(self.weights() | self.moments())
        state = TrainState(iteration=iteration, consumed_samples=8 * iteration, dropout_seed=7)
        result = save_checkpoint(
            folder, state, config=config_of(), model=self.model, optimizer=self.optimizer
        )
        assert result.error == ""

    def load(self, folder: Path | None, **options: object) -> LoadedState:
        return load_checkpoint(
            folder, config=config_of(**options), model=self.model, optimizer=self.optimizer
        )


def _first_start_and_restart(folder: Path) -> None:
    old, own = folder / "old", folder / "own"
    Stood().save(old, 10)
    options = {"pretrained_checkpoint": str(old), "seed": 5}
    for load in (None, own):
        fresh = Stood()
        begun = fresh.load(load, **options)
        assert (begun.iteration, begun.consumed_train_samples, begun.dropout_seed) == (0, 0, 5)
        assert begun.line().startswith("finetuning at iteration 0 with the weights of")
        assert wrong_keys(fresh.weights()) == []
        assert not any(moment.any() for moment in fresh.moments().values())
        assert fresh.optimizer.step_count == 3  # untouched, not that of the checkpoint
        config = config_of(load=None if load is None else str(load), **options)
        line = start_line(config, Launch.from_environment())
        assert line.startswith("finetuning at iteration 0 with the weights of")
        assert ("holds no checkpoint yet" in line) == (load is not None)
    Stood().save(own, 4)
    again = Stood().load(own, **options)
    assert (again.iteration, again.consumed_train_samples, again.dropout_seed) == (4, 32, 7)
    assert again.path == own / "iter_0000004"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_restart_goes_on_and_does_not_begin_anew(tmp_path: Path, world_size: int) -> None:
    run_ranks(_first_start_and_restart, world_size, tmp_path)


def _nothing_there(folder: Path) -> None:
    for load in (None, folder):
        with pytest.raises(CheckpointError, match=r"--pretrained.* holds no checkpoint"):
            Stood().load(load, pretrained_checkpoint=str(folder / "none"))


def test_an_empty_folder_is_named_on_every_rank(tmp_path: Path) -> None:
    run_ranks(_nothing_there, 2, tmp_path)
