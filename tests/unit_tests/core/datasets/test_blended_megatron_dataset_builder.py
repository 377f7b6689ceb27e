import logging
import math
from pathlib import Path

import pytest
import torch

from megatron.core.datasets.blend import Blend
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import (
    BlendedMegatronDatasetBuilder,
    DataSources,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.errors import DataError
from tests.helpers.documents import ListDocuments, counting_documents, write_documents

CONFIG = GPTDatasetConfig(sequence_length=8, random_seed=1)


def build(
    files: dict[str, list[list[int]]],
    sizes: tuple[int | None, int | None, int | None],
    *,
    weights: tuple[float, ...] | None = None,
    split: str | None = "80,10,10",
    per_split: tuple[str | None, str | None, str | None] | None = None,
    order="even",
):
    blend = Blend(tuple(files), weights)
    blends = (blend, blend, blend)
    if per_split:
        blends = tuple(name and Blend((name,), None) for name in per_split)
    sources = DataSources(
        blends=blends,
        split=split,
        whole_files=per_split is not None,
        open_source=lambda name: ListDocuments(files[name]),
        in_memory=True,
    )
    return BlendedMegatronDatasetBuilder(CONFIG, sources, sizes=sizes, order=order).build()


def tokens_of(dataset) -> set[int]:
    found = [dataset[n][key] for n in range(len(dataset)) for key in ("tokens", "labels")]
    return set(torch.cat(found).tolist()) - {0}


def test_one_source_is_divided_into_contiguous_ranges() -> None:
    documents = counting_documents([10] * 20)
    train, valid, test = build({"a": documents}, (3, 2, 1))
    assert isinstance(train, GPTDataset)
    ranges = [documents[:16], documents[16:18], documents[18:]]
    for dataset, part, split in zip(
        (train, valid, test), ranges, ("train", "valid", "test"), strict=True
    ):
        assert dataset.split == split
        allowed = {token for document in part for token in document}
        assert tokens_of(dataset) <= allowed
        assert set(dataset.indices.document_index.tolist()) == {
            documents.index(document) for document in part
        }


def test_no_samples_wanted_gives_no_data_set() -> None:
    assert build({"a": counting_documents([10] * 20)}, (3, 0, 0))[1:] == (None, None)


def test_a_share_of_zero_gives_no_data_set() -> None:
    _, valid, test = build({"a": counting_documents([10] * 20)}, (3, 5, 5), split="1")
    assert (valid, test) == (None, None)


def test_splits_may_have_files_of_their_own() -> None:
    files = {"a": counting_documents([10] * 9), "b": counting_documents([50, 60])}
    train, valid, test = build(files, (3, 5, 5), split=None, per_split=("a", "b", None))
    assert train.indices.document_index.tolist() != []
    assert len(set(train.indices.document_index.tolist())) == 9
    assert set(valid.indices.document_index.tolist()) == {0, 1}
    assert test is None


def test_a_blend_has_exactly_the_size_asked_for_and_sources_that_suffice() -> None:
    files = {"a": counting_documents([30] * 10), "b": counting_documents([5] * 40)}
    train, _, _ = build(files, (500, 0, 0), weights=(0.3, 0.7))
    assert isinstance(train, BlendedDataset)
    assert len(train) == 500
    assert [train.indices.source_index.tolist().count(i) for i in (0, 1)] == [150, 350]
    for number in range(500):
        train[number]


def test_a_source_is_a_little_larger_than_its_share() -> None:
    files = {"a": counting_documents([9] * 10), "b": counting_documents([9] * 10)}
    train, _, _ = build(files, (2000, 0, 0), weights=(0.25, 0.75), split="1")
    for source, weight in zip(train.datasets, (0.25, 0.75), strict=True):
        wanted = math.ceil(math.ceil(2000 * weight) * 1.005)
        assert len(source) >= wanted
        assert (source.num_epochs - 1) * source.num_tokens < wanted * 8 + 1


def test_without_weights_sources_count_by_their_samples() -> None:
    files = {"a": counting_documents([81]), "b": counting_documents([241])}  # 10 and 30 samples
    train, _, _ = build(files, (40, 0, 0), split="1")
    assert [train.indices.source_index.tolist().count(i) for i in (0, 1)] == [10, 30]
    assert [source.num_epochs for source in train.datasets] == [1, 1]
    train, _, _ = build(files, (400, 0, 0), split="1")
    assert [train.indices.source_index.tolist().count(i) for i in (0, 1)] == [100, 300]


def test_one_epoch_of_a_blend_needs_no_size() -> None:
    files = {"a": counting_documents([81]), "b": counting_documents([241])}
    assert len(build(files, (None, 0, 0), split="1")[0]) == 40
    assert len(build(files, (None, 0, 0), split="1", weights=(0.5, 0.5))[0]) == 20


def test_tiny_sources_and_weights_never_raise() -> None:
    files = {"big": counting_documents([100] * 20), "tiny": [[1, 2, 3]]}
    for weights in [(1 - 1e-9, 1e-9), (0.5, 0.5), None]:
        train, _, _ = build(files, (300, 0, 0), weights=weights, split="1")
        for number in range(300):
            train[number]


def test_the_order_of_megatron_can_be_asked_for() -> None:
    files = {name: counting_documents([100] * 5) for name in "abc"}
    weights = (0.95, 0.025, 0.025)
    even, _, _ = build(files, (300, 0, 0), weights=weights, split="1")
    theirs, _, _ = build(files, (300, 0, 0), weights=weights, split="1", order="megatron")
    assert even.fingerprint != theirs.fingerprint


def test_a_default_split_too_small_for_validation_is_noted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        train, valid, test = build({"a": counting_documents([30] * 5)}, (3, 5, 5), split=None)
    assert train is not None
    assert (valid, test) == (None, None)
    assert "--split 969,30,1 (the default) of 5 documents gives 5, 0, 0" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}  # shown by rank 0 alone


@pytest.mark.parametrize(("split", "sizes"), [("1", (3, 5, 5)), (None, (3, 0, 0))])
def test_nothing_is_said_of_data_that_nobody_asked_for(
    caplog: pytest.LogCaptureFixture, split: str | None, sizes: tuple[int, int, int]
) -> None:
    with caplog.at_level(logging.INFO):
        build({"a": counting_documents([30] * 5)}, sizes, split=split)
    assert "left out" not in caplog.text


def test_a_split_without_documents_that_was_asked_for_is_refused() -> None:
    with pytest.raises(DataError, match=r"of 5 documents gives 5, 0, 0.*--eval-iters 0"):
        build({"a": counting_documents([30] * 5)}, (3, 5, 5), split="99,1")
    with pytest.raises(DataError, match=r"no train documents in a: --split 0.01,1 of 5"):
        build({"a": counting_documents([30] * 5)}, (3, 5, 5), split="0.01,1")


def test_a_small_source_is_left_out_of_validation(caplog: pytest.LogCaptureFixture) -> None:
    files = {"a": counting_documents([30] * 20), "b": counting_documents([30] * 2)}
    with caplog.at_level(logging.WARNING):
        train, valid, _ = build(files, (3, 5, 0), weights=(0.5, 0.5))
    assert isinstance(train, BlendedDataset)
    assert isinstance(valid, GPTDataset)
    assert (valid.name, "left out of the valid data" in caplog.text) == ("a", True)


def test_training_text_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(DataError, match=r"a, b: 6 training tokens .*--seq-length 8"):
        build({"a": [[1, 2, 3]], "b": [[1, 2, 3, 4, 5, 6]]}, (10, 0, 0), split="1")


def test_the_index_lies_beside_the_data(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "my_data", counting_documents([30] * 5))
    blend = Blend((prefix,), None)
    sources = DataSources(blends=(blend, None, None), split="1", open_source=IndexedDataset)
    train, _, _ = BlendedMegatronDatasetBuilder(CONFIG, sources, sizes=(4, 0, 0)).build()
    assert train is not None
    folder = tmp_path / "cache" / "GPTDataset_indices"
    assert len(list(folder.glob("*-GPTDataset-train-document_index.npy"))) == 1
