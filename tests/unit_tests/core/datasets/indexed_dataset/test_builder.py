"""What is written is byte for byte Megatron's, and is there whole or not at all."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.errors import DataError

# documents [1, 2, 3] and [4, 5] in int32: magic, version 1, code 4, 2 sequences, 3 document
# indices; lengths 3 and 2; offsets 0 and 12; documents 0, 1, 2
EXAMPLE_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 04 0200000000000000 0300000000000000"
    "03000000 02000000 0000000000000000 0c00000000000000"
    "0000000000000000 0100000000000000 0200000000000000"
)
EXAMPLE_BIN = bytes.fromhex("01000000 02000000 03000000 04000000 05000000")


def _write(prefix, documents, dtype=np.int32):
    with IndexedDatasetBuilder(f"{prefix}.bin", dtype) as builder:
        for document in documents:
            builder.add_document(document)
        builder.finalize(f"{prefix}.idx")


def test_the_example_of_megatrons_format_is_written_byte_for_byte(tmp_path):
    _write(tmp_path / "a", [[1, 2, 3], [4, 5]])
    assert len(EXAMPLE_IDX) == 82
    assert (tmp_path / "a.idx").read_bytes() == EXAMPLE_IDX
    assert (tmp_path / "a.bin").read_bytes() == EXAMPLE_BIN


@given(
    st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=4), max_size=6),
    st.sampled_from([np.uint16, np.int32, np.int64]),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_written_is_read_back(tmp_path, documents, dtype):
    with IndexedDatasetBuilder(tmp_path / "p.bin", dtype) as builder:
        for document in documents:
            for sequence in document:
                builder.add_item(sequence)
            builder.end_document()
        builder.finalize(tmp_path / "p.idx")
    dataset = IndexedDataset(tmp_path / "p")
    dataset.verify()
    sequences = [sequence for document in documents for sequence in document]
    assert [found.tolist() for found in dataset[:]] == sequences
    ends = np.cumsum([0, *(len(document) for document in documents)])
    assert dataset.document_indices.tolist() == ends.tolist()
    assert dataset.dtype == dtype


def test_blocks_of_documents_equal_documents_one_by_one(tmp_path):
    _write(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    with IndexedDatasetBuilder(tmp_path / "b.bin", np.int32) as builder:
        builder.add_documents(np.array([1, 2, 3, 4]), np.array([3, 1]))
        builder.add_documents(np.array([5, 6]), np.array([2]))
        builder.finalize(tmp_path / "b.idx")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_document_may_have_several_sequences(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a.bin") as builder:
        builder.add_document([1, 2, 3], [1, 2])
        builder.finalize(tmp_path / "a.idx")
    dataset = IndexedDataset(tmp_path / "a")
    assert [ids.tolist() for ids in dataset[:]] == [[1], [2, 3]]
    assert dataset.document_indices.tolist() == [0, 2]


def test_a_cpu_tensor_is_a_document(tmp_path):
    _write(tmp_path / "a", [torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    assert (tmp_path / "a.bin").read_bytes() == EXAMPLE_BIN


@pytest.mark.parametrize(
    ("dtype", "ids"),
    [
        (np.uint16, [65536]),
        (np.uint16, [-1]),
        (np.int32, [2**31]),
        (np.uint16, np.array([70000], np.int64)),
        (np.int32, np.array([1.5])),
    ],
)
def test_an_id_that_does_not_fit_is_refused_not_wrapped(tmp_path, dtype, ids):
    with (
        IndexedDatasetBuilder(tmp_path / "a.bin", dtype) as builder,
        pytest.raises(DataError, match="do not fit"),
    ):
        builder.add_document(ids)


@pytest.mark.parametrize("vocab_size", [65499, 65500, 65535, 65536, 65537])
def test_the_highest_id_survives(tmp_path, vocab_size):
    from megatron.core.datasets.indexed_dataset.format import DType

    _write(tmp_path / "a", [[0, vocab_size - 1]], DType.optimal_dtype(vocab_size))
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [0, vocab_size - 1]


def test_leaving_without_finalize_leaves_no_file(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a.bin") as builder:
        builder.add_document([1, 2])
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_older_dataset(tmp_path):
    _write(tmp_path / "a", [[1, 2, 3], [4, 5]])

    def fail():
        with IndexedDatasetBuilder(tmp_path / "a.bin") as builder:
            builder.add_document([7])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert (tmp_path / "a.bin").read_bytes() == EXAMPLE_BIN


def test_two_writers_of_one_dataset_are_not_let_in(tmp_path):
    with (
        IndexedDatasetBuilder(tmp_path / "a.bin"),
        pytest.raises(DataError, match="being written by another process"),
    ):
        IndexedDatasetBuilder(tmp_path / "a.bin")


def test_datasets_are_appended(tmp_path):
    _write(tmp_path / "a", [[1, 2, 3]])
    _write(tmp_path / "b", [[4, 5]])
    with IndexedDatasetBuilder(tmp_path / "c.bin") as builder:
        builder.add_index(tmp_path / "a")
        builder.add_index(tmp_path / "b")
        builder.finalize(tmp_path / "c.idx")
    assert (tmp_path / "c.idx").read_bytes() == EXAMPLE_IDX
    assert (tmp_path / "c.bin").read_bytes() == EXAMPLE_BIN


def test_datasets_of_another_dtype_are_not_appended(tmp_path):
    _write(tmp_path / "a", [[1]], np.uint16)
    with (
        IndexedDatasetBuilder(tmp_path / "c.bin", np.int32) as builder,
        pytest.raises(DataError, match=r"uint16.*int32"),
    ):
        builder.add_index(tmp_path / "a")
