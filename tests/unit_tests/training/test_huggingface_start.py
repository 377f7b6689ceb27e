"""A run that begins with a folder of Hugging Face's: options, weights, and what is refused."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.errors import CheckpointError, ConfigError
from megatron.training.arguments import parse_args
from megatron.training.checkpoint_model import load_trained_model
from megatron.training.checkpoint_state import LoadedState, TrainState
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.huggingface import import_checkpoint
from megatron.training.initialize import Launch
from megatron.training.start_up import start_line
from megatron.training.starting_point import StartingPoint, starting_point
from tests.helpers.hf_cases import VOCAB
from tests.helpers.hf_tiny import plan_of, tiny_folder
from tests.helpers.stored_checkpoints import store_facts
from tests.helpers.tiny_tokenizers import huggingface_file

pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Leave no process group behind, which a model on one process makes."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


_RUN = f"--mock-data --tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} --seq-length 24"


def options(folder: Path, words: str = "--use-checkpoint-args", world_size: int = 1) -> object:
    line = f"{_RUN} --load {folder} --train-iters 1 --lr 1e-3 {words}"
    return parse_args(line.split(), world_size=world_size)


def test_a_folder_is_a_starting_point_of_weights(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "theirs", "llama2")
    found = starting_point(CheckpointConfig(load=str(folder)))
    expected = StartingPoint(folder=folder, iteration=0, weights_only=True, is_huggingface=True)
    assert found == expected
    assert found.path == folder
    own = tmp_path / "own"
    both = CheckpointConfig(load=str(own), pretrained_checkpoint=str(folder))
    assert starting_point(both) == expected
    store_facts(own, 3, {"config": {}})
    assert starting_point(both) == StartingPoint(folder=own, iteration=3)


def test_an_imported_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    import_checkpoint(tiny_folder(tmp_path / "theirs", "llama2"), tmp_path / "ours")
    found = starting_point(CheckpointConfig(load=str(tmp_path / "ours")))
    assert found == StartingPoint(folder=tmp_path / "ours", iteration=0, weights_only=True)


def test_options_come_from_config_json(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen2-windows", torch.bfloat16)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"torch_dtype": "bfloat16", ', 1))
    config = options(folder)
    model = config.model
    assert (model.num_layers, model.add_qkv_bias, model.bf16) == (4, True, True)
    assert model.window_attn_skip_freq == [0, 0, 1, 1]
    assert config.tokenizer.padded_vocab_size == VOCAB
    launch = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert start_line(config, launch) == f"finetuning at iteration 0 with the weights of {folder}"


def test_ranks_of_tensor_parallelism_add_the_fewest_rows(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama2")
    words = "--use-checkpoint-args --tensor-model-parallel-size 4"
    tokenizer = options(folder, words, world_size=4).tokenizer
    assert (tokenizer.padded_vocab_size, VOCAB) == (72, 70)


def test_a_config_that_cannot_be_built_ends_the_run(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama2")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"new_thing": 1, ', 1))
    with pytest.raises(ConfigError, match="unknown new_thing"):
        options(folder)


def begin(folder: Path, words: str) -> LoadedState:
    """Load the folder as a run does, into a model of one process."""
    trained = load_trained_model(tiny_folder(folder.parent / "any", "llama2"))
    config = options(folder, words)
    return load_checkpoint(folder, config=config, model=trained.model, optimizer=None)


def test_another_model_is_refused_by_flag(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "theirs", "llama2")
    with pytest.raises(CheckpointError) as raised:
        begin(folder, "--use-checkpoint-args --rotary-base 5000")
    assert "--use-checkpoint-args takes what config.json says" in str(raised.value)
    assert "--rotary-base is 10000 in the checkpoint and 5000" in str(raised.value)


def test_numbers_of_another_format_are_converted_and_told(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "theirs", "llama2", torch.bfloat16)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"dtype": "bfloat16", ', 1))
    trained = load_trained_model(folder)
    assert {param.dtype for param in trained.model.parameters()} == {torch.bfloat16}
    loaded = begin(tiny_folder(tmp_path / "wide", "llama2"), "--use-checkpoint-args")
    assert (loaded.iteration, loaded.notices) == (0, ())


def test_text_is_made_straight_from_a_folder(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama2")
    huggingface_file(folder)
    trained = load_trained_model(folder)
    assert trained.tokenizer is not None
    assert trained.tokenizer.name == "HuggingFaceTokenizer"
    from safetensors.torch import load_file

    theirs = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    ours = dict(trained.model.named_parameters())["embedding.word_embeddings.weight"]
    assert torch.equal(ours, theirs)


def test_a_tensor_that_no_rank_holds_is_named(tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import model_tensors
    from megatron.training.huggingface_load import load_folder

    folder = tiny_folder(tmp_path / "theirs", "llama2")
    config = options(folder)
    tensors = model_tensors(load_trained_model(folder).model)
    del tensors["model.decoder.layers.3.mlp.linear_fc2.weight"]
    with pytest.raises(CheckpointError, match=r"no rank holds decoder\.layers\.3\.mlp\.linear_fc2"):
        load_folder(folder, tensors, config=config, rows=VOCAB, group=None)
    tensors["model.decoder.layers.7.strange"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"missing: decoder\.layers\.7\.strange"):
        load_folder(folder, tensors, config=config, rows=VOCAB, group=None)
    assert plan_of("llama2").shapes.keys() >= {"decoder.layers.3.mlp.linear_fc2.weight"}


def test_the_end_of_a_document_goes_along(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "theirs", "llama2")
    huggingface_file(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    import_checkpoint(folder, tmp_path / "ours")
    begun = load_trained_model(folder)
    assert begun.tokenizer is not None
    state = TrainState(iteration=1)
    saved = save_checkpoint(
        tmp_path / "run",
        state,
        config=begun.config,
        model=begun.model,
        optimizer=None,
        tokenizer=begun.tokenizer,
    )
    assert saved.error == ""
    shutil.rmtree(folder)
    for checkpoint in ("ours", "run"):
        again = load_trained_model(tmp_path / checkpoint)
        assert again.tokenizer is not None
        assert again.tokenizer.eod == begun.tokenizer.eod
    assert again.tokenizer.detokenize([begun.tokenizer.eod]) == ""
