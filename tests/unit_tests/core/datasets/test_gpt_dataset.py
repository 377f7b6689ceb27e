import logging
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.errors import DataError
from tests.helpers.documents import ListDocuments, counting_documents

CONFIG = GPTDatasetConfig(sequence_length=8, random_seed=5, vocab_size=1000)
RESET = replace(CONFIG, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)


def make(
    documents: list[list[int]],
    config: GPTDatasetConfig = CONFIG,
    num_samples: int | None = None,
    split="train",
) -> GPTDataset:
    return GPTDataset(
        ListDocuments(documents),
        name="my_data",
        documents=(0, len(documents)),
        num_samples=num_samples,
        split=split,
        config=config,
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8).filter(lambda n: sum(n) > 9))
def test_samples_put_end_to_end_are_the_shuffled_documents(lengths: list[int]) -> None:
    documents = counting_documents(lengths)
    dataset = make(documents, num_samples=12)
    order = dataset.indices.document_index.tolist()
    stream = [token for number in order for token in documents[number]]
    for number in range(len(dataset)):
        begin = int(dataset.indices.shuffle_index[number]) * 8
        sample = dataset[number]
        assert sample["tokens"].tolist() == stream[begin : begin + 8]
        assert sample["labels"].tolist() == stream[begin + 1 : begin + 9]


def test_a_plain_sample_has_every_token_count_and_no_mask() -> None:
    sample = make(counting_documents([30, 30]))[0]
    assert {name: (value.dtype, list(value.shape)) for name, value in sample.items()} == {
        "tokens": (torch.int64, [8]),
        "labels": (torch.int64, [8]),
        "loss_mask": (torch.float32, [8]),
        "position_ids": (torch.int64, [8]),
    }
    assert sample["loss_mask"].tolist() == [1.0] * 8
    assert sample["position_ids"].tolist() == list(range(8))


def in_one_sample(documents: list[list[int]], config: GPTDatasetConfig) -> dict[str, torch.Tensor]:
    """The sample that begins at the first document, which stays in place with this seed."""
    dataset = make(documents, config)
    assert dataset.indices.document_index.tolist() == list(range(len(documents)))
    return dataset[dataset.indices.shuffle_index.tolist().index(0)]


THREE = [[11, 12, 0], [21, 22, 23, 0], [31, 0, 33]]


def keep_order(documents: list[list[int]], config: GPTDatasetConfig) -> GPTDatasetConfig:
    for seed in range(1000):
        tried = replace(config, random_seed=seed)
        order = make(documents, tried).indices.document_index.tolist()
        if order == list(range(len(documents))):
            return tried
    raise AssertionError("no seed keeps the order")


def test_positions_restart_with_each_document() -> None:
    sample = in_one_sample(THREE, keep_order(THREE, RESET))
    assert sample["tokens"].tolist() == [11, 12, 0, 21, 22, 23, 0, 31]
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]


def test_tokens_see_only_earlier_tokens_of_their_document() -> None:
    sample = in_one_sample(THREE, keep_order(THREE, RESET))
    mask = sample["attention_mask"]
    assert (mask.dtype, list(mask.shape)) == (torch.bool, [1, 8, 8])
    document = [0, 0, 0, 1, 1, 1, 1, 2]
    for query in range(8):
        for key in range(8):
            may = key <= query and document[key] == document[query]
            assert bool(mask[0, query, key]) == (not may)


def test_what_follows_a_document_is_not_a_target() -> None:
    sample = in_one_sample(THREE, keep_order(THREE, RESET))
    assert sample["loss_mask"].tolist() == [1, 1, 0, 1, 1, 1, 0, 1]


def test_a_border_behind_the_last_token_still_masks_the_loss() -> None:
    documents = [[1, 2, 3, 4, 5, 6, 7, 8], [21, 22]]
    sample = in_one_sample(documents, keep_order(documents, RESET))
    assert sample["labels"].tolist() == [2, 3, 4, 5, 6, 7, 8, 21]
    assert sample["loss_mask"].tolist() == [1] * 7 + [0]
    assert sample["position_ids"].tolist() == list(range(8))


def test_an_end_of_document_id_inside_a_text_is_an_ordinary_token() -> None:
    documents = [[1, 0, 3, 0, 0, 6, 7, 8, 9, 0]]
    sample = make(documents, RESET)[0]
    assert sample["loss_mask"].tolist() == [1.0] * 8
    assert sample["position_ids"].tolist() == list(range(8))


def test_masks_are_not_shared_with_samples_that_have_none() -> None:
    dataset = make(counting_documents([3, 4, 20, 5, 6]), RESET, num_samples=40)
    masks = [dataset[number]["loss_mask"].clone() for number in range(len(dataset))]
    again = [dataset[number]["loss_mask"] for number in range(len(dataset))]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    assert any(mask.min() == 0 for mask in masks)
    assert any(mask.min() == 1 for mask in masks)


@pytest.mark.parametrize("foreign", [1000, 2_000_000, -1])
def test_an_id_outside_the_vocabulary_names_the_document(foreign: int) -> None:
    documents = counting_documents([20, 20, 20])
    documents[1][4] = foreign
    dataset = make(documents)
    with pytest.raises(DataError, match=rf"my_data: document 1 .*{foreign}.* 1000 ids"):
        list(map(dataset.__getitem__, range(len(dataset))))


def test_too_little_text_says_how_much_there_is_and_what_helps() -> None:
    with pytest.raises(DataError) as error:
        make([[1, 2, 3], [4, 5, 6, 7, 8]])
    for word in ("my_data", "train", "8 tokens", "2 documents", "--seq-length 8", "--split"):
        assert word in str(error.value)
    with pytest.raises(DataError, match="0 tokens"):
        make([[], []], num_samples=3, split="valid")


def test_a_small_validation_split_is_repeated_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = make([[1, 2, 3]], num_samples=4, split="valid")
    tokens = dataset[0]["tokens"].tolist()
    assert all(after == before % 3 + 1 for before, after in pairwise(tokens))
    assert "repeated within a sample" in caplog.text


def test_a_sample_that_does_not_exist_is_refused() -> None:
    dataset = make(counting_documents([30]))
    for number in (-1, len(dataset)):
        with pytest.raises(IndexError, match="my_data"):
            dataset[number]


def test_fingerprints_tell_other_orders_apart() -> None:
    documents = counting_documents([30, 20])
    base = make(documents).fingerprint
    assert make(documents).fingerprint == base
    assert make(documents, replace(CONFIG, random_seed=6)).fingerprint != base
    assert make(documents, replace(CONFIG, sequence_length=9)).fingerprint != base
    assert make(documents[::-1]).fingerprint != base
    assert make(documents, num_samples=20).fingerprint != base


def test_an_index_from_the_cache_gives_the_same_samples(tmp_path) -> None:
    source = ListDocuments(counting_documents([30, 20, 7]))
    settings = {"name": "d", "documents": (0, 3), "num_samples": 9, "split": "train"}
    first, second, fresh = (
        GPTDataset(source, config=CONFIG, cache_folder=folder, **settings)
        for folder in (tmp_path, tmp_path, None)
    )
    assert isinstance(second.indices.sample_index, np.memmap)
    for number in range(len(fresh)):
        expected = fresh[number]["tokens"]
        assert torch.equal(first[number]["tokens"], expected)
        assert torch.equal(second[number]["tokens"], expected)
