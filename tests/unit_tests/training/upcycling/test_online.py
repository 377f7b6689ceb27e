"""--moe-use-upcycling with a folder of Hugging Face's, and at later starts of one command line."""

from pathlib import Path

import pytest

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.errors import CheckpointError
from megatron.training.arguments import parse_args
from megatron.training.config.run_config import RunConfig
from megatron.training.huggingface import export_checkpoint
from megatron.training.upcycling.online import after_upcycling
from tests.helpers.small_runs import alone_in_the_world
from tools.upcycling.dense_models import BASE, FAMILIES, save_dense

MOE = "--num-experts 4 --moe-use-upcycling --moe-upcycling-granularity 2 --moe-ffn-hidden-size 48"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    with alone_in_the_world():
        save_dense(folder / "dense", "llama")
    export_checkpoint(folder / "dense", folder / "hf", family="llama")
    return folder


def config_of(words: str) -> RunConfig:
    return parse_args(f"{BASE} {FAMILIES['llama']} {MOE} {words}".split(), world_size=1)


def test_a_folder_of_hugging_faces_gives_the_same_experts(folder, tmp_path) -> None:
    for source in ("dense", "hf"):
        config = config_of(f"--load {folder}/{source} --save {tmp_path}/{source}")
        started = after_upcycling(config, None).checkpoint
        assert (started.load, started.finetune) == (f"{tmp_path}/{source}", True)
    one, two = (StoredCheckpoint.open(tmp_path / source) for source in ("dense", "hf"))
    assert one.index.keys() == two.index.keys()
    assert all(one.block_hashes(key) == two.block_hashes(key) for key in one.keys)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
    ]
    rows = config_of(f"--load {folder}/hf --save {tmp_path}/wide --padded-vocab-size 384")
    after_upcycling(rows, None)
    wide = StoredCheckpoint.open(tmp_path / "wide")
    assert wide.facts("model.embedding.word_embeddings.weight").shape == (384, 64)


def test_one_command_line_upcycles_once(folder, tmp_path) -> None:
    own = tmp_path / "own"
    words = f"--pretrained-checkpoint {folder}/dense --load {own} --save {own}"
    first = after_upcycling(config_of(words), None).checkpoint
    assert (first.load, first.pretrained_checkpoint, first.finetune) == (str(own), None, True)
    config = config_of(words)
    assert after_upcycling(config, None) is config, "the second start goes on from --load"


def test_a_folder_that_is_in_use_meanwhile_is_not_overwritten(folder, tmp_path) -> None:
    config = config_of(f"--load {folder}/dense --save {tmp_path}")
    after_upcycling(config, None)
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        after_upcycling(config, None)
