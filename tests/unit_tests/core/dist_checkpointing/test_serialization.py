import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.serialization import (
    read_tensors,
    stored_tensors,
    write_tensors,
)
from megatron.core.errors import CheckpointError
from tests.helpers.ranks import run_ranks


def test_a_view_of_a_large_buffer_is_stored_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"model.a": torch.zeros(1_000_000)[:10]}, None)
    assert (tmp_path / "__0_0.distcp").stat().st_size < 10_000


def test_nothing_is_written_into_tensors_that_do_not_fit(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"model.a": torch.ones(3), "model.b": torch.ones(3)}, None)
    wanted = {"model.a": torch.zeros(3), "model.b": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"model.b is float32 \[3\] on disk"):
        read_tensors(tmp_path, wanted, None, prefixes=("model.",))
    assert wanted["model.a"].eq(0).all()


def test_other_prefixes_are_left_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"model.a": torch.ones(3), "optimizer.a": torch.ones(3)}, None)
    wanted = {"model.a": torch.zeros(3)}
    read_tensors(tmp_path, wanted, None, prefixes=("model.",))
    assert wanted["model.a"].eq(1).all()


class Stranger:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('a stranger ran')",))


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Stranger()))
    with pytest.raises(CheckpointError, match=r"builtins\.exec has no place"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({})])
def test_a_damaged_index_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        stored_tensors(tmp_path)


def _write_shared_and_own(folder: str) -> None:
    rank = dist.get_rank()
    tensors = {f"model.dense{i}": torch.zeros(50_000) for i in range(16)}
    tensors[f"model.expert{rank}"] = torch.zeros(100_000)
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def test_shared_tensors_are_stored_once_and_spread_evenly(tmp_path: Path) -> None:
    run_ranks(_write_shared_and_own, 2, str(tmp_path))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.distcp")]
    unique = 4 * (16 * 50_000 + 2 * 100_000)
    assert len(sizes) == 2
    assert unique < sum(sizes) < 1.05 * unique
    assert max(sizes) < 1.2 * min(sizes)


def _want_something_else(folder: str) -> None:
    wanted = {f"model.expert{dist.get_rank() + 1}": torch.zeros(100_000)}
    with pytest.raises(CheckpointError) as caught:
        read_tensors(Path(folder), wanted, dist.group.WORLD, prefixes=("model.expert",))
    messages = gather(str(caught.value), dist.group.WORLD)
    assert messages[0] == messages[1]
    assert "missing in the checkpoint:\n  - model.expert2" in messages[0]
    assert "no rank of this run wants them:\n  - model.expert0" in messages[0]


def test_all_ranks_raise_the_same_when_keys_of_one_rank_are_missing(tmp_path: Path) -> None:
    run_ranks(_write_shared_and_own, 2, str(tmp_path))
    run_ranks(_want_something_else, 2, str(tmp_path))
