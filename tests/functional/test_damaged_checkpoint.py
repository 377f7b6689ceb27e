"""Whatever is damaged in a checkpoint ends the load on every rank, and is called by its name."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.index import read_index
from megatron.core.errors import CheckpointError
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.training.arguments import parse_args
from megatron.training.initialize import Launch, initialize
from megatron.training.setup_model import setup_run
from megatron.training.start_up import start_line
from megatron.training.training import load
from pretrain_gpt import forward_step, model_provider
from tests.helpers.damage import DAMAGES, EXPERT_3
from tests.helpers.forked_training import train
from tests.helpers.ranks import run_ranks

FLAGS = (
    "--mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 4 "
    "--moe-router-topk 2 --seq-length 32 --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 "
    "--lr-decay-style constant --eval-iters 0 --device cpu --num-workers 0 --train-iters 2"
)
WHOLE = "nothing"
BEFORE_READING = ("manifest", "tracker", "index", "common.json", "gone", "cut", "longer", "half")
"""Damages so called are found before the first tensor is read."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    flags = f"{FLAGS} --expert-model-parallel-size 2 --save {folder} --save-interval 1"
    run_ranks(train, 2, flags.split())
    return folder


def loading_rank(flags: list[str], folders: dict[str, str], reports: str, world_size: int) -> None:
    """Try to load from each folder; note what it said, and whether the model is as it was."""
    config = parse_args(flags, world_size=world_size)
    world, launch = initialize(config), Launch.from_environment()
    tokenizer = build_tokenizer(config.tokenizer)
    run = setup_run(config, world, model_provider, forward_step)
    found = {}
    for name, folder in folders.items():
        config.checkpoint.load, before, message = folder, state_hash(run.model), ""
        try:
            start_line(config, launch)
            load(run, tokenizer, launch)
        except CheckpointError as error:
            message = str(error).replace(folder, "LOAD")
        found[name] = [message, state_hash(run.model) == before]
    Path(reports, f"{world.rank}.json").write_text(json.dumps(found))


def state_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for param in model.parameters():
        digest.update(param.detach().numpy().tobytes())
    return digest.hexdigest()


Said = dict[str, list[tuple[str, bool]]]
"""Damage -> what each rank said, and whether its model was as before."""


def load_all(checkpoints: Path, place: Path, world_size: int, ep: int) -> Said:
    folders = {}
    for number, name in enumerate([*DAMAGES, WHOLE]):
        folder = place / str(number)
        shutil.copytree(checkpoints, folder)
        if name in DAMAGES:
            DAMAGES[name][0](folder / "iter_0000002")
        folders[name] = str(folder)
    flags = f"{FLAGS} --expert-model-parallel-size {ep} --load {place / '0'} --allow-fresh-start"
    run_ranks(loading_rank, world_size, flags.split(), folders, str(place), world_size)
    reports = [json.loads((place / f"{rank}.json").read_text()) for rank in range(world_size)]
    return {name: [tuple(report[name]) for report in reports] for name in folders}


@pytest.fixture(scope="module")
def said(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    return load_all(checkpoints, tmp_path_factory.mktemp("damaged"), world_size=2, ep=2)


def assert_named(name: str, reports: list[tuple[str, bool]]) -> None:
    messages = {message for message, _ in reports}
    assert len(messages) == 1, "every rank says the same"
    message = messages.pop()
    for words in DAMAGES[name][1]:
        assert words in message, message
    if any(kind in name for kind in BEFORE_READING):
        assert all(untouched for _, untouched in reports), "the model was changed"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_ends_the_load_on_every_rank_and_is_named(name: str, said: Said) -> None:
    assert_named(name, said[name])


def test_a_whole_checkpoint_loads(said: Said, checkpoints: Path) -> None:
    """The copies are right, and what is damaged in one of them is read at all."""
    assert said[WHOLE] == [("", False), ("", False)]
    assert EXPERT_3 in read_index(checkpoints / "iter_0000002")


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (4, 2)])
def test_damage_is_named_on_other_numbers_of_ranks_too(
    world_size: int, ep: int, checkpoints: Path, tmp_path: Path
) -> None:
    said = load_all(checkpoints, tmp_path, world_size, ep)
    assert said[WHOLE] == [("", False)] * world_size
    for name in DAMAGES.keys() - {"a bit of a generator"}:  # read by as many ranks as saved
        assert_named(name, said[name])
