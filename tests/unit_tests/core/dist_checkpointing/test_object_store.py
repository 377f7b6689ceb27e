import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.object_folders import place, store_problem
from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)
from megatron.core.errors import CheckpointError
from megatron.core.extensions.object_store import ObjectPath
from tests.helpers.object_store import BUCKET, ObjectStore, make_store, objects, unfinished
from tests.helpers.ranks import run_ranks

NUMBERS = 50_000
KILLED = 9
KILLS = 5


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ObjectStore, "asked", [])
    monkeypatch.setattr(ObjectStore, "uploads", [])
    return make_store(tmp_path)


def content(value: float = 1.0, size: int = 10) -> CheckpointContent:
    tensors = {f"model.{name}": torch.full((size,), float(value)) for name in "abc"}
    return CheckpointContent(tensors=tensors, common={"step": value})


def write(url: str, iteration: int, value: float | None = None, **options: int) -> ObjectPath:
    written = content(iteration if value is None else value)
    return write_checkpoint(place(url), iteration, written, None, **options)[0]


def loaded(url: str, iteration: int | None = None, size: int = 10) -> float:
    """Return the value in the checkpoint, after comparing every number and document."""
    opened = open_checkpoint(place(url), None, iteration=iteration)
    assert opened is not None
    tensors = {f"model.{name}": torch.zeros(size) for name in "abc"}
    read_tensors(opened.path, tensors, None, prefixes=("model.",))
    assert all(tensor.eq(opened.common["step"]).all() for tensor in tensors.values())
    return opened.common["step"]


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let uploads of objects of this name fail."""
    monkeypatch.setattr(ObjectStore, "fails", staticmethod(lambda path: path.endswith(name)))


def complete(url: str) -> list[int]:
    return folders.complete_iterations(place(url))


def test_what_was_written_is_opened_and_lies_under_its_final_name(url: str) -> None:
    path = write(url, 5)
    assert (str(path), loaded(url)) == (f"{url}/iter_0000005", 5)
    names = ["common.json", "index.json", "manifest.json", "tensors_00000.safetensors"]
    assert objects(url) == [*(f"iter_0000005/{name}" for name in names), folders.TRACKER]


def test_an_empty_store_opens_as_none(url: str) -> None:
    assert open_checkpoint(place(url), None) is None
    assert complete(url) == []


def test_an_older_iteration_can_be_asked_for_and_the_others_are_named(url: str) -> None:
    write(url, 5)
    write(url, 10)
    assert loaded(url, 5) == 5
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of iteration 6.*: 5, 10"):
        loaded(url, 6)


def test_keep_last_deletes_the_oldest_and_the_manifest_of_each_first(url: str, monkeypatch) -> None:
    gone: list[str] = []
    remove = ObjectStore._rm
    monkeypatch.setattr(ObjectStore, "_rm", lambda s, path: (gone.append(path), remove(s, path)))
    for step in (5, 10, 15):
        write(url, step, keep_last=2)
    assert complete(url) == [10, 15]
    assert not any("iter_0000005" in name for name in objects(url))
    first = next(path for path in gone if "iter_0000005" in path and ".begun" not in path)
    assert first.endswith("iter_0000005/manifest.json")


def test_a_checkpoint_is_replaced_and_replaced_again(url: str) -> None:
    for value in (1.0, 2.0, 3.0):
        write(url, 5, value)
        assert loaded(url) == value
        assert complete(url) == [5]
        assert len(objects(url)) == 5, "the one before is gone"


def test_documents_travel_and_are_lent_as_local_files(url: str, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_text("words")
    files = {"tokenizer/vocab/t.model": tmp_path / "t.model"}
    made = CheckpointContent(tensors={}, common={}, files=files)
    path, _ = write_checkpoint(place(url), 5, made, None)
    with folders.local_copies(path, {"vocab": "tokenizer/vocab/t.model"}) as copies:
        assert copies["vocab"].read_text() == "words"
        assert copies["vocab"].name == "t.model"
    assert not copies["vocab"].exists()


@pytest.mark.parametrize("name", ["tensors_00000.safetensors", "common.json"])
def test_a_damaged_object_is_named(url: str, name: str) -> None:
    path = write(url, 5)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-3] + b"\xff\xff\xff")
    with pytest.raises(CheckpointError, match=name):
        loaded(url)


def test_large_files_go_up_in_parts(url: str) -> None:
    write_checkpoint(place(url), 5, content(size=500_000), None)
    parts = [size for name, size in ObjectStore.uploads if name.endswith(".safetensors")]
    assert len(parts) >= 3
    assert sum(parts) > 3 * 4 * 500_000


def blocks(count: int, size: int) -> dict[str, torch.Tensor]:
    return {f"model.{number:03d}": torch.full((size,), float(number)) for number in range(count)}


def read(path: ObjectPath, names: list[str], size: int) -> list[int]:
    """Return the bytes of each request that reading these tensors took of their file."""
    ObjectStore.asked.clear()
    wanted = {name: torch.zeros(size) for name in names}
    read_tensors(path, wanted, None, prefixes=tuple(wanted))
    assert all(tensor.eq(int(name[6:])).all() for name, tensor in wanted.items())
    return [count for name, _, count in ObjectStore.asked if name.endswith(".safetensors")]


def test_many_small_blocks_are_read_in_one_request_and_few_blocks_are_not_the_file(
    url: str,
) -> None:
    made = CheckpointContent(tensors=blocks(100, 10_000), common={})
    path, _ = write_checkpoint(place(url), 5, made, None)
    names = sorted(made.tensors)
    assert read(path, names, 10_000) == [100 * 40_000]
    assert read(path, [names[3], names[90]], 10_000) == [40_000, 40_000], "far apart"
    assert read(path, [names[3], names[5]], 10_000) == [3 * 40_000], "a gap below a request's cost"


def test_a_large_block_is_read_in_several_requests(url: str) -> None:
    made = CheckpointContent(tensors=blocks(2, 3_000_000), common={})
    path, _ = write_checkpoint(place(url), 5, made, None)
    assert read(path, ["model.001"], 3_000_000) == [8 << 20, 12_000_000 - (8 << 20)]


def test_the_store_says_no_and_earlier_checkpoints_stay(url: str, monkeypatch) -> None:
    write(url, 5)
    before = objects(url)
    for failing in ("tensors_00000.safetensors", "index.json", "common.json", "manifest.json"):
        refuse(monkeypatch, failing)
        with pytest.raises(CheckpointError, match="no more room in this bucket") as caught:
            write(url, 10)
        assert str(caught.value).count("\n") == 0
        assert url in str(caught.value)
        assert loaded(url) == 5
        assert objects(url) == before, failing
        assert not unfinished(url), "what was sent is given back"
    monkeypatch.undo()
    write(url, 10)
    assert loaded(url) == 10


def test_a_tracker_that_cannot_be_written_leaves_both_whole(url: str, monkeypatch) -> None:
    write(url, 5)
    refuse(monkeypatch, folders.TRACKER)
    for value in (2.0, 3.0):
        with pytest.raises(CheckpointError, match="no more room"):
            write(url, 10, value)
        assert loaded(url) == 5
        assert loaded(url, 10) == 2.0, "the first is whole: a second does not cost it"
    monkeypatch.undo()
    write(url, 10, 4.0)
    assert (loaded(url), len(objects(url))) == (4.0, 9)


def _one_store_of_two_says_no(url: str) -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    mine = {"model.a": torch.zeros(10), f"model.own{rank}": torch.zeros(200_000)}
    write_checkpoint(place(url), 5, CheckpointContent(tensors=mine, common={}), group)
    if rank == 1:
        ObjectStore.fails = staticmethod(lambda path: True)
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(place(url), 10, CheckpointContent(tensors=mine, common={}), group)
    told = f"rank 1: no more room in this bucket ({url}/iter_0000010/tensors_00001.safetensors)"
    assert gather(str(caught.value), group) == [told] * 2
    dist.barrier()
    opened = open_checkpoint(place(url), group)
    assert opened is not None
    assert opened.path.name == "iter_0000005"


def test_a_rank_that_cannot_write_fails_all_and_leaves_nothing_behind(url: str) -> None:
    run_ranks(_one_store_of_two_says_no, 2, url)
    assert not any("iter_0000010" in name for name in objects(url))


def _a_store_of_each_rank(url: str) -> None:
    if dist.get_rank() == 1:
        make_store(Path("other"))
        ObjectStore._home = lambda self, path: Path("other", BUCKET)
    with pytest.raises(CheckpointError, match=r"rank 1: .* is not visible on"):
        write_checkpoint(place(url), 5, content(), dist.group.WORLD)


def test_ranks_that_see_other_stores_are_told_before_anything_is_written(
    url: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_ranks(_a_store_of_each_rank, 2, url)
    assert objects(url) == []


def _write_until(url: str, iteration: int, last: int) -> bool:
    """Save in a forked process that dies before its ``last`` + 1st change of the store."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), "saving failed of itself"
        return code == 0
    changes, code = 0, 1

    def counted(change):
        def wrapper(*args, **kwargs):
            nonlocal changes
            changes += 1
            if changes > last:
                os._exit(KILLED)
            return change(*args, **kwargs)

        return wrapper

    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    try:
        write(url, iteration, 100.0 + iteration, keep_last=1)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("iteration", [5, 10])
def test_a_save_killed_at_any_change_of_the_store_leaves_a_loadable_latest(
    url: str, iteration: int
) -> None:
    """Iteration 5 is there already and is replaced; 10 is new and prunes 5."""
    write(url, 5)
    last, done, seen = 0, False, []
    while not done:
        done = _write_until(url, iteration, last)
        seen.append(loaded(url))
        last += 1
    assert last > 10
    assert set(seen) == {5, 100.0 + iteration}
    write(url, 15, keep_last=1)
    assert {name.partition("/")[0] for name in objects(url)} == {"iter_0000015", folders.TRACKER}


def _save_for_ever(url: str, first: int) -> None:
    for iteration in range(first, 1_000_000):
        rank = dist.get_rank()
        own = {f"model.{name}{rank}": torch.full((NUMBERS,), float(iteration)) for name in "ab"}
        shared = {"model.a": torch.full((10,), float(iteration))}
        made = CheckpointContent(tensors=own | shared, common={"iteration": iteration})
        write_checkpoint(place(url), iteration, made, dist.group.WORLD, keep_last=2)


def _latest_of_two_ranks(url: str) -> int:
    opened = open_checkpoint(place(url), None)
    if opened is None:
        return 0
    tensors = {f"model.{name}{rank}": torch.zeros(NUMBERS) for name in "ab" for rank in (0, 1)}
    read_tensors(opened.path, tensors, None, prefixes=tuple(tensors))
    assert all(tensor.eq(opened.common["iteration"]).all() for tensor in tensors.values())
    return opened.common["iteration"]


def test_kill_9_of_two_ranks_at_random_moments_leaves_a_loadable_latest(url: str) -> None:
    draw, latest, interrupted = random.Random(3), 0, 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            os.setsid()  # so that its ranks die with it
            try:
                run_ranks(_save_for_ever, 2, url, latest + 1)
            finally:
                os._exit(1)
        began = time.perf_counter()
        while max(complete(url), default=0) < latest + 2:
            assert time.perf_counter() - began < 60, "no save ever finishes"
        time.sleep(draw.uniform(0.0, 0.05))
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = _latest_of_two_ranks(url)
        assert after > latest, "the tracker may not name the newest yet"
        latest = after
        names = {name.partition("/")[0] for name in objects(url) if "iter_" in name}
        interrupted += len(names) > len(complete(url))
    assert interrupted > 0, "no save was ever interrupted: the test shows nothing"


def test_a_url_is_a_place_and_travels_to_other_processes() -> None:
    path = place("S3://bucket//run/") / "iter_0000010"
    assert isinstance(path, ObjectPath)
    assert str(path) == "s3://bucket/run/iter_0000010"
    assert (path.name, path.suffix, str(path.parent)) == ("iter_0000010", "", "s3://bucket/run")
    assert pickle.loads(pickle.dumps(path)) == path == place("s3://bucket/run/iter_0000010/")
    assert (path / "common.json").suffix == ".json"
    assert place("runs/a") == Path("runs/a")
    assert place("file:///data/run") == Path("/data/run")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nosuch://bucket/run", r"is of no kind that fsspec knows \(nosuch://\)"),
        ("s3://", "names no bucket"),
        ("simplecache::s3://bucket/run", "is a chain of stores, which is not offered"),
    ],
)
def test_a_url_that_cannot_be_is_refused(url: str, problem: str) -> None:
    assert re.fullmatch(problem, store_problem(place(url)))


def test_a_missing_driver_is_named_with_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    problem = store_problem(place("s3://bucket/run"))
    assert problem == "needs the package s3fs: pip install 'megatron-moe[object-store]'"


def test_a_missing_fsspec_is_named_with_the_extra() -> None:
    program = (
        "import sys; sys.modules['fsspec'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'fsspec' else find(n, *a)\n"
        "from megatron.core.dist_checkpointing.object_folders import place, store_problem\n"
        "print(store_problem(place('s3://bucket/run')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "needs the package fsspec: pip install 'megatron-moe[object-store]'\n"


def test_a_missing_bucket_is_nothing_to_read_and_cannot_be_written(url: str) -> None:
    missing = place(url.replace(BUCKET, "_other_"))
    assert store_problem(missing) == ""
    assert folders.complete_iterations(missing) == []
    with pytest.raises(OSError, match="bucket does not exist") as caught:
        folders.prove_writable(missing)
    assert str(missing) in str(caught.value)
