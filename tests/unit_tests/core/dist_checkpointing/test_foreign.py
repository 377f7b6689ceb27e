"""Checkpoints of Megatron-LM are told by their files and refused, not half read."""

from pathlib import Path

import pytest

from megatron.core.dist_checkpointing.folders import latest_iteration
from megatron.core.dist_checkpointing.foreign import refuse_foreign
from megatron.core.errors import CheckpointError, ConfigError
from megatron.training.arguments import parse_args
from tests.helpers.stored_checkpoints import store_facts


def megatron_folder(folder: Path, inside: str, *names: str) -> Path:
    (folder / inside).mkdir(parents=True)
    for name in names:
        (folder / inside / name).write_bytes(b"\x80")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


@pytest.mark.parametrize(
    ("inside", "names", "words"),
    [
        ("iter_0000010", ("common.pt", ".metadata", "__0_0.distcp"), "torch_dist or zarr: it has"),
        ("release", (".metadata",), "release is a checkpoint of Megatron-LM"),
        ("iter_0000010", ("mp_rank_00",), "legacy: it has mp_rank_00"),
    ],
)
def test_a_checkpoint_of_megatron_is_refused_with_the_way_round(
    tmp_path: Path, inside: str, names: tuple[str, ...], words: str
) -> None:
    folder = megatron_folder(tmp_path, inside, *names)
    with pytest.raises(CheckpointError, match=words) as raised:
        latest_iteration(folder)
    assert "--from hf" in str(raised.value)
    with pytest.raises(CheckpointError, match=words):
        refuse_foreign(folder / inside)


def test_a_run_that_begins_with_one_ends_before_it_begins(tmp_path: Path) -> None:
    folder = megatron_folder(tmp_path, "iter_0000010", "common.pt")
    words = f"--num-layers 2 --hidden-size 64 --mock-data --load {folder}"
    with pytest.raises(ConfigError, match="is a checkpoint of Megatron-LM") as raised:
        parse_args(words.split(), world_size=1)
    assert len(raised.value.problems) == 1


def test_our_own_are_not_taken_for_theirs(tmp_path: Path) -> None:
    store_facts(tmp_path, 10, {"config": {}})
    refuse_foreign(tmp_path)
    assert latest_iteration(tmp_path) == 10
