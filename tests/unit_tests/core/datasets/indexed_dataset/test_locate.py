"""Which dataset --data-path means."""

import pytest

from megatron.core.datasets.indexed_dataset.locate import find_prefix
from megatron.core.errors import DataError


def _make(*prefixes):
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            prefix.with_name(prefix.name + suffix).touch()


def test_a_prefix_is_taken_as_it_is_before_its_longer_form(tmp_path):
    _make(tmp_path / "d", tmp_path / "d_text_document")
    assert find_prefix(tmp_path / "d") == str(tmp_path / "d")


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_files_of_a_dataset_mean_the_dataset(tmp_path, suffix):
    _make(tmp_path / "d.v1")
    assert find_prefix(f"{tmp_path / 'd.v1'}{suffix}") == str(tmp_path / "d.v1")


def test_the_output_prefix_of_preprocessing_is_enough(tmp_path):
    _make(tmp_path / "d_text_document")
    assert find_prefix(tmp_path / "d") == str(tmp_path / "d_text_document")


def test_all_places_are_named_when_there_is_none(tmp_path):
    with pytest.raises(DataError) as error:
        find_prefix(tmp_path / "d")
    for name in ("d.bin", "d.idx", "d_text_document.bin", "d_text_document.idx"):
        assert str(tmp_path / name) in str(error.value)
    assert "preprocess_data.py makes one" in str(error.value)


def test_half_a_dataset_is_told(tmp_path):
    (tmp_path / "d.bin").touch()
    with pytest.raises(DataError, match=r"d\.idx.*found only .*d\.bin"):
        find_prefix(tmp_path / "d")


def test_datasets_of_other_keys_are_suggested(tmp_path):
    _make(tmp_path / "d_content_document")
    with pytest.raises(DataError, match=r"did you mean .*d_content_document\?"):
        find_prefix(tmp_path / "d")


def test_text_that_was_not_preprocessed_is_told(tmp_path):
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(DataError, match="text must go through"):
        find_prefix(tmp_path / "d")
