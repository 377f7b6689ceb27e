"""The bytes of an .idx file, and which dtype holds which vocabulary."""

import numpy as np
import pytest

from megatron.core.datasets.indexed_dataset.format import DType, IndexHeader, read_header
from megatron.core.errors import DataError

CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_dtype_codes_are_megatrons(name, code):
    assert DType.code_from_dtype(np.dtype(name)) == code
    assert DType.dtype_from_code(code) == np.dtype(name)


@pytest.mark.parametrize("vocab_size", [1, 300, 65499, 65500, 65535, 65536, 65537, 151936])
def test_the_dtype_holds_every_id(vocab_size):
    dtype = DType.optimal_dtype(vocab_size)
    assert np.iinfo(dtype).max >= vocab_size - 1
    assert dtype is (np.uint16 if vocab_size < 65500 else np.int32)


def test_an_unknown_vocabulary_gets_the_wide_dtype():
    assert DType.optimal_dtype(None) is np.int32


def test_the_header_has_34_bytes_and_comes_back(tmp_path):
    header = IndexHeader(np.dtype("<u2"), 0, 1)
    assert len(header.pack()) == 34
    (tmp_path / "a.idx").write_bytes(header.pack() + bytes(8))
    assert read_header(tmp_path / "a.idx") == header


def _header(change):
    content = bytearray(IndexHeader(np.dtype("<i4"), 0, 1).pack() + bytes(8))
    change(content)
    return bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.__setitem__(0, 0), "does not start with"),
        (lambda b: b.__setitem__(9, 2), "version 2; this program reads version 1"),
        (lambda b: b.__setitem__(17, 99), "unknown dtype code 99"),
        (lambda b: b.__setitem__(18, 1), "has 42 bytes, but its header"),
        (lambda b: b.__delitem__(slice(20, None)), "cut short: 20 bytes"),
        (lambda b: b.clear(), "does not start with"),
    ],
)
def test_a_bad_header_says_what_is_wrong(tmp_path, change, message):
    (tmp_path / "bad.idx").write_bytes(_header(change))
    with pytest.raises(DataError, match=f"bad.idx.*{message}"):
        read_header(tmp_path / "bad.idx")


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.idx does not exist"):
        read_header(tmp_path / "gone.idx")


def test_a_dtype_without_code_is_refused():
    with pytest.raises(DataError, match="cannot hold uint32"):
        DType.code_from_dtype(np.uint32)
