"""Kernels are compiled once, kept where only the user writes, and done without where they fail."""

import ctypes
import logging
from pathlib import Path

import pytest
import torch

from megatron.core.cpu_kernels import build, choice
from megatron.core.errors import BackendError

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
ANSWER = 'extern "C" int answer() { return NUMBER; }\n'
SIZE = """
namespace at { int get_num_threads(); }
extern "C" int threads() { return at::get_num_threads(); }
"""


SHARED = """
#include "parallel.h"
extern "C" void add_one(int64_t *counts, int64_t *parts, int64_t size)
{
    in_parallel(size, 100, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            counts[i]++;
        __atomic_fetch_add(parts, 1, __ATOMIC_SEQ_CST);
    });
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    kept = tmp_path / "kept"
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(kept))
    build.kernel_folder.cache_clear()
    yield kept
    build.kernel_folder.cache_clear()


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER)
    return path


@needs_compiler
def test_compiled_once_for_each_text_and_options(folder, source, monkeypatch):
    assert build.load(source, options=["-DNUMBER=3"]).answer() == 3
    assert build.load(source, options=["-DNUMBER=4"]).answer() == 4
    assert len(list(folder.iterdir())) == 2
    runs = []
    monkeypatch.setattr(build, "_compile", lambda *line: runs.append(line))
    assert build.load(source, options=["-DNUMBER=3"]).answer() == 3
    assert not runs
    source.write_text(ANSWER.replace("NUMBER", "NUMBER + 1"))
    with pytest.raises(BackendError, match="cannot be loaded"):
        build.load(source, options=["-DNUMBER=3"])  # nothing made it
    assert len(runs) == 1


@needs_compiler
def test_the_text_of_a_header_counts_too(folder, source):
    header = source.with_name("number.h")
    source.write_text('#include "number.h"\n#include "vectors.h"\n' + ANSWER)
    for number in (7, 8):
        header.write_text(f"#define NUMBER {number}\n")
        assert build.load(source).answer() == number


@needs_compiler
def test_functions_of_torch_can_be_called(folder, tmp_path):
    path = tmp_path / "threads.cpp"
    path.write_text(SIZE)
    assert build.load(path, with_torch=True).threads() == torch.get_num_threads()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_work_is_shared_among_threads(folder, tmp_path, threads):
    path = tmp_path / "shared.cpp"
    path.write_text(SHARED)
    counts = torch.zeros(1000, dtype=torch.int64)
    parts = torch.zeros(1, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        add = build.load(path).add_one
        add(*map(ctypes.c_void_p, (counts.data_ptr(), parts.data_ptr())), ctypes.c_int64(1000))
        add(*map(ctypes.c_void_p, (counts.data_ptr(), parts.data_ptr())), ctypes.c_int64(199))
    finally:
        torch.set_num_threads(before)
    expected = torch.ones(1000, dtype=torch.int64)
    expected[:199] += 1
    assert torch.equal(counts, expected)
    is_shared = "-fopenmp" in build.openmp()
    assert parts.item() == (threads if is_shared else 1) + 1  # 199 is not worth two threads


@needs_compiler
def test_a_damaged_file_is_compiled_anew(folder, source, monkeypatch):
    monkeypatch.setattr(build, "_digest", lambda *facts: "name")
    folder.mkdir(mode=0o700)
    (folder / "answer-name.so").write_bytes(b"cut short")
    assert build.load(source, options=["-DNUMBER=5"]).answer() == 5


@needs_compiler
def test_an_error_of_the_compiler_is_told_and_leaves_nothing(folder, source):
    with pytest.raises(BackendError, match=r"failed and said: .*error: "):
        build.load(source)
    assert not list(folder.iterdir())


@needs_compiler
def test_a_folder_that_others_may_write_is_not_used(folder, source):
    folder.mkdir()
    folder.chmod(0o777)
    assert build.kernel_folder() is None
    assert build.load(source, options=["-DNUMBER=6"]).answer() == 6
    assert not list(folder.iterdir())


def test_an_empty_variable_keeps_nothing(folder, monkeypatch):
    monkeypatch.setenv(build.FOLDER_VARIABLE, "")
    assert build.kernel_folder() is None


def test_no_compiler(monkeypatch, source):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="there is no C\\+\\+ compiler"):
        build.load(source)
    assert choice.describe() == "torch's kernels (no C++ compiler)"


@pytest.fixture
def nothing_made(monkeypatch):
    monkeypatch.setattr(choice, "_made", {})
    monkeypatch.setattr(choice, "_failed", {})


def test_a_kernel_is_made_once(nothing_made):
    calls = []
    for _ in range(2):
        assert choice.kernel("sums", lambda: calls.append(1) or "made") == "made"
    assert calls == [1]
    with choice.using("torch"):
        assert choice.kernel("sums", lambda: "made") is None
        assert "--cpu-kernels torch" in choice.describe()


def test_a_kernel_that_fails_is_told_once_and_refused_where_asked_for(nothing_made, caplog):
    def fail():
        raise BackendError("no luck")

    with caplog.at_level(logging.WARNING, logger=choice.__name__):
        assert choice.kernel("sums", fail) is None
        assert choice.kernel("sums", fail) is None
    assert [r.message for r in caplog.records] == [
        "sums is not compiled, torch computes it: no luck"
    ]
    with choice.using("compiled"), pytest.raises(BackendError, match="compiled: sums: no luck"):
        choice.kernel("sums", fail)


def test_a_kernel_is_tried_out_as_in_a_new_process(nothing_made):
    def make():
        x = torch.rand(2, requires_grad=True)
        (x * x).sum().backward()
        return x.grad.dtype, x.grad.device.type

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            assert choice.kernel("squares", make) == (torch.float32, "cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(1), expected)


def test_what_kernels_can_compute_with():
    assert choice.is_for(torch.empty(2))
    assert choice.is_for(torch.nn.Parameter(torch.empty(2, dtype=torch.bfloat16)))
    assert not choice.is_for(torch.empty(2, dtype=torch.float64))
    assert not choice.is_for(torch.empty(2, device="meta"))
