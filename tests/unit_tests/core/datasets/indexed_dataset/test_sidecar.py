"""The note beside the data: finds the tokenizer again, refuses another one."""

import dataclasses
import json

import numpy as np
import pytest

from megatron.core.datasets.indexed_dataset import sidecar as sidecars
from megatron.core.errors import DataError
from megatron.core.tokenizers.build_tokenizer import TokenizerSettings, build_tokenizer
from megatron.core.tokenizers.byte_tokenizer import ByteTokenizer
from tests.helpers.tiny_tokenizers import sentencepiece_model


@pytest.fixture
def made(tmp_path):
    """A data folder with a tokenizer and a sidecar."""
    (tmp_path / "data").mkdir()
    model = sentencepiece_model(tmp_path / "T.model")
    tokenizer = build_tokenizer(
        TokenizerSettings(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    )
    prefix = tmp_path / "data" / "my_data_text_document"
    sidecar = sidecars.Sidecar(
        **sidecars.describe_tokenizer(prefix, tokenizer),
        append_eod=True,
        documents=2,
        sequences=2,
        tokens=5,
        dtype="uint16",
        json_key="text",
    )
    sidecars.write_sidecar(prefix, sidecar)
    return prefix, sidecar, tokenizer


def test_a_sidecar_comes_back(made):
    prefix, sidecar, _ = made
    assert sidecars.read_sidecar(prefix) == sidecar
    assert sidecar.tokenizer_files["tokenizer_model"].relative == "../T.model"
    assert [path.name for path in prefix.parent.iterdir()] == ["my_data_text_document.json"]


def test_data_without_a_sidecar_is_fine(tmp_path):
    assert sidecars.read_sidecar(tmp_path / "megatrons") is None


def test_the_tokenizer_is_built_again(made):
    prefix, sidecar, tokenizer = made
    again = build_tokenizer(sidecars.tokenizer_settings(prefix, sidecar))
    assert again.fingerprint() == tokenizer.fingerprint() == sidecar.fingerprint
    sidecars.check_tokenizer(prefix, sidecar, again)


def test_the_tokenizer_is_found_after_all_files_moved(made, tmp_path):
    prefix, sidecar, _ = made
    moved = tmp_path.parent / f"{tmp_path.name}_moved"
    tmp_path.rename(moved)
    found = sidecars.tokenizer_settings(moved / "data" / prefix.name, sidecar)
    assert found.tokenizer_model is not None
    assert (
        sidecars.sha256_of(moved / "T.model") == sidecar.tokenizer_files["tokenizer_model"].sha256
    )


def test_the_tokenizer_is_found_after_the_data_moved(made, tmp_path):
    prefix, sidecar, _ = made
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    found = sidecars.tokenizer_settings(tmp_path / "a" / "b" / "c" / prefix.name, sidecar)
    assert found.tokenizer_model == str(tmp_path / "T.model")


def test_a_changed_tokenizer_is_refused_with_both_hashes(made, tmp_path):
    prefix, sidecar, _ = made
    (tmp_path / "T.model").write_bytes(b"other")
    with pytest.raises(DataError, match=r"T.model has changed .* sha256 \w{12} now, \w{12} then"):
        sidecars.tokenizer_settings(prefix, sidecar)


def test_a_lost_tokenizer_is_named(made, tmp_path):
    prefix, sidecar, _ = made
    (tmp_path / "T.model").unlink()
    with pytest.raises(DataError, match=r"looked for .*T.model and .*; name it with --tokenizer-m"):
        sidecars.tokenizer_settings(prefix, sidecar)


def test_another_tokenizer_is_refused_with_both_values(made):
    prefix, sidecar, _ = made
    with pytest.raises(DataError, match=r"SentencePieceTokenizer .*310 ids.* not with Byte.*257"):
        sidecars.check_tokenizer(prefix, sidecar, ByteTokenizer())


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 1}', "{", '"x"'])
def test_a_damaged_sidecar_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json is not the sidecar"):
        sidecars.read_sidecar(tmp_path / "a")


def test_a_later_version_is_refused_with_both_versions(made):
    prefix, sidecar, _ = made
    content = {**dataclasses.asdict(sidecar), "format_version": 7}
    sidecars.sidecar_path(prefix).write_text(json.dumps(content))
    with pytest.raises(DataError, match="version 7; this program reads version 1"):
        sidecars.read_sidecar(prefix)


def test_an_id_beyond_the_vocabulary_names_its_document():
    sidecars.check_ids("p", 3, np.array([0, 9], np.uint16), 10)
    with pytest.raises(DataError, match="document 3 holds the id 10, but the vocabulary has 10"):
        sidecars.check_ids("p", 3, np.array([0, 10], np.uint16), 10)
