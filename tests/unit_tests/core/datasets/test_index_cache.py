import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets import index_cache
from megatron.core.datasets.index_cache import Arrays, cache_folder, load_or_build

DESCRIPTION = {"seed": 1, "documents": [0, 5]}
FORK = multiprocessing.get_context("fork")


def arrays() -> Arrays:
    return {"one": np.arange(1000, dtype=np.int32), "two": np.arange(6.0).reshape(3, 2)}


def must_not_build() -> Arrays:
    raise AssertionError("built again")


def load(folder: Path) -> Arrays:
    return load_or_build(folder, "Kind-train", DESCRIPTION, must_not_build)


def assert_right(found: Arrays) -> None:
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_what_was_built_is_mapped_the_next_time(tmp_path: Path) -> None:
    assert_right(load_or_build(tmp_path / "new", "Kind-train", DESCRIPTION, arrays))
    found = load(tmp_path / "new")
    assert_right(found)
    assert isinstance(found["one"], np.memmap)


def test_files_are_named_by_hash_and_kind(tmp_path: Path) -> None:
    load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays)
    digest = index_cache.description_digest(DESCRIPTION)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{digest}-Kind-train-{part}" for part in ("description.txt", "one.npy", "two.npy")
    ]


def test_another_description_is_another_set(tmp_path: Path) -> None:
    load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays)
    with pytest.raises(AssertionError, match="built again"):
        load_or_build(tmp_path, "Kind-train", DESCRIPTION | {"seed": 2}, must_not_build)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, os.unlink])
@pytest.mark.parametrize("part", ["one.npy", "description.txt"])
def test_a_damaged_file_is_built_again(
    tmp_path: Path, part: str, damage, caplog: pytest.LogCaptureFixture
) -> None:
    load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays)
    damage(next(tmp_path.glob(f"*{part}")))
    assert_right(load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays))
    assert_right(load(tmp_path))
    gone = damage is os.unlink
    noted_only = part == "description.txt" and damage is flip_a_bit
    assert noted_only or ("damaged" in caplog.text) == (not gone)


def test_a_file_that_others_have_mapped_is_never_written_to(tmp_path: Path) -> None:
    load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays)
    files = sorted(tmp_path.iterdir())
    before = [path.stat().st_ino for path in files]
    held = [path.open("rb") for path in files]  # keeps the old inodes from being used again
    next(tmp_path.glob("*description.txt")).write_text("{}")
    load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays)
    assert not set(before) & {path.stat().st_ino for path in files}
    for file in held:
        file.close()


def test_a_folder_that_cannot_be_made_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert_right(load_or_build(tmp_path / "file" / "sub", "Kind", DESCRIPTION, arrays))
    assert "--data-cache-path" in caplog.text


def test_without_a_folder_nothing_is_written() -> None:
    assert_right(load_or_build(None, "Kind", DESCRIPTION, arrays))


def test_the_default_folder_lies_beside_the_data() -> None:
    assert cache_folder(None, "/data/set/my_data") == Path("/data/set/cache/GPTDataset_indices")
    assert cache_folder("/elsewhere", "/data/set/my_data") == Path("/elsewhere")


def race(folder: Path, start, done) -> None:
    start.wait()
    for _ in range(5):
        assert_right(load_or_build(folder, "Kind-train", DESCRIPTION, arrays))
    done.put(os.getpid())


@pytest.mark.parametrize("num_folders", [1, 2])
def test_eight_racing_processes_all_get_the_arrays(tmp_path: Path, num_folders: int) -> None:
    start, done = FORK.Event(), FORK.Queue()
    racers = [
        FORK.Process(target=race, args=(tmp_path / str(rank % num_folders), start, done))
        for rank in range(8)
    ]
    for racer in racers:
        racer.start()
    start.set()
    finished = {done.get(timeout=30) for _ in racers}
    for racer in racers:
        racer.join()
    assert finished == {racer.pid for racer in racers}
    for folder in tmp_path.iterdir():
        assert_right(load(folder))
        assert not list(folder.glob("*.tmp"))


def build_forever(folder: Path, writing) -> None:
    def slow() -> Arrays:
        writing.set()
        return arrays()

    while True:
        load_or_build(folder, "Kind-train", DESCRIPTION, slow)
        for path in folder.glob("*description.txt"):
            path.unlink()


def test_a_killed_builder_leaves_nothing_half_valid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(6):
        writing = FORK.Event()
        builder = FORK.Process(target=build_forever, args=(tmp_path, writing))
        builder.start()
        writing.wait(10)
        time.sleep(rng.uniform(0, 0.01))
        assert builder.pid is not None
        os.kill(builder.pid, signal.SIGKILL)
        builder.join()
        assert_right(load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays))
        assert_right(load(tmp_path))


def test_leftovers_of_killed_processes_go_after_an_hour(tmp_path: Path) -> None:
    digest = index_cache.description_digest(DESCRIPTION)
    old, new = (tmp_path / f"{digest}-Kind-train-one.npy.{n}.tmp" for n in (1, 2))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    load_or_build(tmp_path, "Kind-train", DESCRIPTION, arrays)
    assert (old.exists(), new.exists()) == (False, True)
