"""Which checkpoint a run begins with."""

from pathlib import Path

import pytest

from megatron.core.errors import CheckpointError
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.config.run_config import RunConfig
from megatron.training.initialize import Launch
from megatron.training.start_up import start_line
from megatron.training.starting_point import (
    StartingPoint,
    folder_and_iteration,
    starting_point,
)
from tests.helpers.stored_checkpoints import store_facts


def found(**options: object) -> StartingPoint | None:
    texts = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    return starting_point(CheckpointConfig(**texts))


def test_a_run_without_folders_is_fresh(tmp_path: Path) -> None:
    assert found() is None
    assert found(load=tmp_path) is None
    assert found(pretrained_checkpoint=tmp_path) is None


def test_the_runs_own_checkpoint_goes_before_the_pretrained_one(tmp_path: Path) -> None:
    own, old = tmp_path / "own", tmp_path / "old"
    store_facts(old, 10, {"config": {}})
    store_facts(old, 20, {"config": {}})
    both = {"load": own, "pretrained_checkpoint": old}
    assert found(**both) == StartingPoint(folder=old, iteration=20, weights_only=True)
    assert found(pretrained_checkpoint=old / "iter_0000010") == StartingPoint(
        folder=old, iteration=10, weights_only=True
    )
    store_facts(own, 3, {"config": {}})
    assert found(**both) == StartingPoint(folder=own, iteration=3)
    assert found(load=own, ckpt_step=2) == StartingPoint(folder=own, iteration=2)


def test_a_damaged_tracker_is_an_error_and_no_reason_to_begin_anew(tmp_path: Path) -> None:
    store_facts(tmp_path / "old", 10, {"config": {}})
    store_facts(tmp_path / "own", 3, {"config": {}})
    (tmp_path / "own" / "latest_checkpointed_iteration.txt").write_text("many")
    with pytest.raises(CheckpointError, match="'many'"):
        found(load=tmp_path / "own", pretrained_checkpoint=tmp_path / "old")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("run/iter_0000010", ("run", 10)), ("run", ("run", None)), ("iter_x", ("iter_x", None))],
)
def test_one_checkpoint_or_a_folder_of_them(path: str, expected: tuple) -> None:
    assert folder_and_iteration(Path(path)) == (Path(expected[0]), expected[1])


def line_of(options: dict) -> str:
    return start_line(RunConfig.from_flat(options), Launch.from_environment())


def test_the_first_line_of_the_log_says_where_a_run_begins(tmp_path: Path) -> None:
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "load": str(tmp_path)}
    between = shape | {"non_persistent_ckpt_type": "in_memory"}
    nothing = f"starting a fresh run at iteration 0 ({tmp_path} holds no checkpoint yet"
    newer = ", unless a newer in_memory checkpoint is there"
    assert line_of(shape) == f"{nothing})"
    assert line_of(between) == f"{nothing}){newer}"
    store_facts(tmp_path, 3, {"config": {}})
    there = f"resuming at iteration 3 from {tmp_path}/iter_0000003"
    assert line_of(shape) == there
    assert line_of(between) == f"{there}{newer}"
