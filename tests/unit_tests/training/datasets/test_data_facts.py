import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.datasets.mock_dataset import mock_lengths
from megatron.core.errors import ConfigError, DataError
from megatron.training.config.data import DataConfig
from megatron.training.datasets.data_facts import data_facts, find_data
from tests.helpers.documents import counting_documents, write_documents


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_documents(tmp_path / "a_text_document", counting_documents([10] * 20))


def test_facts_are_of_the_training_split(prefix: str) -> None:
    facts = data_facts(DataConfig(data_path=[prefix], split="80,20"))
    assert (facts.num_documents, facts.num_tokens) == (16, 160)
    assert facts.samples_per_epoch(8) == 19
    assert facts.sidecar is None


def test_a_prefix_is_found_without_its_suffix(prefix: str) -> None:
    given = prefix.removesuffix("_text_document")
    assert find_data(DataConfig(data_path=[given])).prefixes == (prefix,)


def test_facts_of_several_sources_add_up(prefix: str, tmp_path: Path) -> None:
    other = write_documents(tmp_path / "b", counting_documents([7] * 3))
    facts = data_facts(DataConfig(data_path=["2", prefix, "1", other], split="1"))
    assert (facts.num_documents, facts.num_tokens) == (23, 221)
    assert facts.samples_per_epoch(10) == 19 + 2


def test_files_of_the_training_split_are_taken_whole(prefix: str, tmp_path: Path) -> None:
    other = write_documents(tmp_path / "b", counting_documents([7] * 3))
    config = DataConfig(train_data_path=[prefix], valid_data_path=[other])
    assert data_facts(config).num_documents == 20
    paths = find_data(config)
    assert [blend and blend.prefixes for blend in paths.blends] == [(prefix,), (other,), None]


def test_mock_data_has_facts_without_files() -> None:
    facts = data_facts(DataConfig(mock_data=True, split="1"))
    assert facts.num_tokens == int(mock_lengths().sum())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no training data: give --data-path"),
        ({"valid_data_path": ["a"]}, "no training data"),
        ({"mock_data": True, "data_path": ["a"]}, "--mock-data cannot be combined with --data-p"),
        ({"data_path": ["a"], "test_data_path": ["b"]}, "combined with --test-data-path"),
        ({"train_data_path": ["a"], "split": "9,1"}, "combined with --split"),
        ({"data_path": ["1", "a", "b"]}, "--data-path 1 a b: give either"),
    ],
)
def test_contradictory_sources_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_data(DataConfig(**options))
    assert said in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing_here_text_document\.bin"):
        data_facts(DataConfig(data_path=[str(tmp_path / "nothing_here")]))


def test_facts_do_not_need_torch() -> None:
    code = "import sys, megatron.training.datasets.data_facts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
