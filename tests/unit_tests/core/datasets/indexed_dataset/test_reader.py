"""Reading: views without copies, offsets past 2^32 bytes, and files that do not fit together."""

import os
import pickle

import numpy as np
import pytest

from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset.format import IndexHeader
from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.errors import DataError


@pytest.fixture
def prefix(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a.bin", np.uint16) as builder:
        for document in ([1, 2, 3], [4, 5], []):
            builder.add_document(document)
        builder.finalize(tmp_path / "a.idx")
    return tmp_path / "a"


def test_parts_of_a_sequence_are_read(prefix):
    dataset = IndexedDataset(prefix)
    assert dataset.get(0, offset=1).tolist() == [2, 3]
    assert dataset.get(0, 1, 1).tolist() == [2]
    assert dataset[2].tolist() == []
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (3, 3, 5)
    with pytest.raises(IndexError, match="3 tokens, asked for 2 from 2"):
        dataset.get(0, 2, 2)
    with pytest.raises(IndexError):
        dataset[3]


def test_sequences_are_read_only_views_of_one_buffer(prefix):
    dataset = IndexedDataset(prefix)
    assert dataset[0].base is not None
    assert np.shares_memory(dataset[0], dataset._tokens)
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 9


def test_a_pickled_dataset_opens_its_files_again(prefix):
    content = pickle.dumps(IndexedDataset(prefix))
    assert len(content) < 400
    assert pickle.loads(content)[1].tolist() == [4, 5]


def test_an_empty_dataset_can_be_opened(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a.bin") as builder:
        builder.finalize(tmp_path / "a.idx")
    dataset = IndexedDataset(tmp_path / "a")
    dataset.verify()
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (0, 0, 0)


@pytest.mark.parametrize("num_bytes", [2**31, 2**32])
def test_offsets_pass_the_range_of_32_bits(tmp_path, num_bytes):
    lengths = np.array([num_bytes // 8 + 3] * 4 + [5], dtype="<i4")
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    pointers = np.concatenate([[0], ends[:-1]]).astype("<i8")
    header = IndexHeader(np.dtype("<u2"), 5, 6)
    documents = np.arange(6, dtype="<i8")
    (tmp_path / "a.idx").write_bytes(
        header.pack() + lengths.tobytes() + pointers.tobytes() + documents.tobytes()
    )
    with (tmp_path / "a.bin").open("wb") as file:  # sparse: takes no room
        file.truncate(int(ends[-1]))
        file.seek(int(pointers[-1]))
        file.write(np.arange(7, 12, dtype="<u2").tobytes())
    assert int(pointers[-1]) > num_bytes
    dataset = IndexedDataset(tmp_path / "a")
    dataset.verify()
    assert dataset[4].tolist() == [7, 8, 9, 10, 11]
    assert dataset.get(3, offset=int(lengths[3]) - 2).tolist() == [0, 0]
    assert os.stat(tmp_path / "a.bin").st_blocks * 512 < 2**20


def test_the_builder_writes_offsets_past_32_bits(tmp_path):
    builder = IndexedDatasetBuilder(tmp_path / "a.bin", np.int32)
    with builder:
        # as if 3 GiB of tokens had been written: only lengths decide the index
        for _ in range(3):
            builder._lengths.write(np.array([2**28], "<i4").tobytes())
            builder.num_sequences += 1
            builder.end_document()
        with (tmp_path / "i").open("wb") as file:
            builder._write_index(file)
    content = (tmp_path / "i").read_bytes()
    assert np.frombuffer(content[34 + 12 : 34 + 36], "<i8").tolist() == [0, 2**30, 2**31]


@pytest.mark.parametrize("change", [-2, +2])
def test_a_bin_of_another_size_names_both_files(prefix, change):
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(10 + change)
    with pytest.raises(DataError, match=r"a\.bin has \d+ bytes, but .*a\.idx describes 10"):
        IndexedDataset(prefix)


def test_a_missing_file_is_named(prefix):
    os.remove(f"{prefix}.bin")
    with pytest.raises(DataError, match=r"a\.bin does not exist, but .*a\.idx does"):
        IndexedDataset(prefix)


def _damage(prefix, offset, value):
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(offset)
        file.write(np.array([value], "<i8").tobytes())


def test_documents_that_do_not_cover_the_sequences_are_refused(prefix):
    _damage(prefix, 34 + 3 * 12 + 3 * 8, 2)
    with pytest.raises(DataError, match="documents do not cover"):
        IndexedDataset(prefix)


def test_verify_finds_a_wrong_pointer(prefix):
    _damage(prefix, 34 + 3 * 4 + 8, 4)
    with pytest.raises(DataError, match="damaged at sequence 1"):
        IndexedDataset(prefix).verify()


def test_the_modes_of_a_multimodal_index_are_passed_over(prefix):
    with open(f"{prefix}.idx", "ab") as file:
        file.write(bytes(3))
    assert IndexedDataset(prefix)[0].tolist() == [1, 2, 3]
