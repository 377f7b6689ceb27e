"""A checkpoint has all that its tokenizer was built from, also what only lay beside a file."""

import json
import shutil
from pathlib import Path

import pytest

from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.dist_checkpointing.store import OpenCheckpoint
from megatron.core.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron.training.checkpoint_model import saved_tokenizer
from megatron.training.tokenizer_facts import tokenizer_copies, tokenizer_facts
from tests.helpers.tiny_tokenizers import huggingface_file


@pytest.mark.parametrize("store", ["folder", "memory"])
@pytest.mark.parametrize("named", [True, False])
def test_a_tokenizer_is_the_same_when_its_folder_is_gone(named, store, tmp_path) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    path = huggingface_file(folder)
    if named:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    tokenizer = HuggingFaceTokenizer(path)
    where = str(tmp_path / "saved") if store == "folder" else f"memory://saved/{named}"
    checkpoint = place(where)
    copies = tokenizer_copies(tokenizer)
    for name, (_, file) in copies.items():
        target = checkpoint / name
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    assert len(copies) == 1 + named
    facts = json.loads(json.dumps(tokenizer_facts(tokenizer)))
    shutil.rmtree(folder)
    again = saved_tokenizer(OpenCheckpoint(checkpoint, {"tokenizer": facts}))  # compares hashes
    assert again is not None
    assert again.eod == (257 if named else 258)
