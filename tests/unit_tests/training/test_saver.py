"""Saves in the background: the state of the step that asked, whatever training does meanwhile."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing import tensor_file
from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.errors import CheckpointError
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.training import saver as saver_module
from megatron.training.run import TrainState
from megatron.training.saver import Saver
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import tiny_batches, tiny_run

PATIENCE_SECONDS = 60


class Gate:
    """Holds back ``publish`` on its thread until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        right = saver_module.publish

        def publish(*args, **kwargs):
            assert self.opened.wait(PATIENCE_SECONDS), "the test forgot the gate"
            return right(*args, **kwargs)

        patch.setattr(saver_module, "publish", publish)


def _tensors(run) -> dict:
    return model_tensors(run.model.module) | optimizer_tensors(run.optimizer.named_state())


def _values(run) -> dict[str, torch.Tensor]:
    """Return copies, of this rank's blocks one behind the other."""
    return {
        key: torch.cat([block.flatten() for block in _blocks(tensor)])
        for key, tensor in _tensors(run).items()
    }


def _blocks(tensor) -> list[torch.Tensor]:
    return [shard.tensor for shard in tensor.shards] if hasattr(tensor, "shards") else [tensor]


def _saver(run) -> Saver:
    return Saver(run, build_tokenizer(run.config.tokenizer), None)


def _step(run, state: TrainState, batches: Iterator) -> None:
    assert train_step(run, state, batches, (0.0, 0.0)).updated
    state.iteration += 1
    state.consumed_samples += run.global_batch_size


def _train_while_it_is_written(folder: str, flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        run = tiny_run(f"--save {folder} --async-save {flags}")
        saver, state, batches = _saver(run), TrainState(), tiny_batches(run)
        for _ in range(2):  # the second save uses the memory of the first again
            gate.opened.clear()
            _step(run, state, batches)
            expected, saved_at = _values(run), state.iteration
            saver.save(state)
            _step(run, state, batches)
            changed = _values(run)
            assert [k for k in expected if "exp_avg" in k and expected[k].equal(changed[k])] == []
            gate.opened.set()
            saver._settle()
            path = Path(folder) / f"iter_{saved_at:07d}"
            prefixes = ("model.", "optimizer.")
            read_tensors(path, _tensors(run), dist.group.WORLD, prefixes=prefixes)
            found = _values(run)
            assert [key for key in expected if not found[key].equal(expected[key])] == []


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, ""), (2, "--expert-model-parallel-size 2 --use-distributed-optimizer")],
)
def test_what_is_written_is_the_state_of_the_step_that_asked(
    tmp_path: Path, ranks: int, flags: str
) -> None:
    run_ranks(_train_while_it_is_written, ranks, str(tmp_path), flags)


class Log:
    """What is logged from now on; in a forked rank pytest's own capture does not reach."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        for level in ("info", "warning"):
            patch.setattr(saver_module.log, level, self._keep)

    def _keep(self, text: str, *values: object) -> None:
        self.lines.append(text % values)

    def __call__(self, word: str) -> list[str]:
        return [line for line in self.lines if word in line]


def _alone(body: Callable[..., None]) -> Callable[[Path], None]:
    """Make a test of ``body(folder, saver, patch)`` that leaves no threads in this process."""

    def test(tmp_path: Path) -> None:
        run_ranks(_with_saver, 1, body, str(tmp_path))

    return test


def _with_saver(body: Callable[..., None], folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        body(Path(folder), _saver(tiny_run(f"--save {folder} --async-save")), patch)


def _told_apart(folder: Path, saver: Saver, patch: pytest.MonkeyPatch) -> None:
    log, gate = Log(patch), Gate(patch)
    saver.save(TrainState(iteration=3))
    assert len(log("saving checkpoint of iteration 3 in the background")) == 1
    saver.look()
    assert log("saved checkpoint") == []
    gate.opened.set()
    saver.finish(TrainState(iteration=3))
    (line,) = log("saved checkpoint")
    assert line.startswith("saved checkpoint of iteration 3 to")
    assert "in the background)" in line


def _one_waits(folder: Path, saver: Saver, patch: pytest.MonkeyPatch) -> None:
    gate = Gate(patch)
    saver.save(TrainState(iteration=3))
    threading.Timer(0.2, gate.opened.set).start()
    saver.save(TrainState(iteration=4))
    assert (folder / "iter_0000003").is_dir()
    saver.finish(TrainState(iteration=4))
    assert (folder / "iter_0000004").is_dir()


def _one_fails(folder: Path, saver: Saver, patch: pytest.MonkeyPatch) -> None:
    log = Log(patch)
    saver.save(TrainState(iteration=3))
    saver._settle()
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(tensor_file.os, "fsync", _full)
        saver.save(TrainState(iteration=4))
        saver._settle()
        (line,) = log("NOT saved")
        assert "iteration 4 was NOT saved: No space left on device" in line
        assert line.endswith("training goes on")
        with pytest.raises(CheckpointError, match="iteration 5 was NOT saved: No space left"):
            saver.finish(TrainState(iteration=5))
    assert {path.name for path in folder.glob("*iter_*")} == {"iter_0000003"}
    saver.finish(TrainState(iteration=5))
    assert (folder / "iter_0000005").is_dir()


def _full(number: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bug(folder: Path, saver: Saver, patch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    patch.setattr(saver_module, "publish", broken)
    saver.save(TrainState(iteration=3))
    with pytest.raises(ZeroDivisionError):
        saver.finish(TrainState(iteration=3))


test_requested_and_completed_are_told_apart = _alone(_told_apart)
test_a_save_waits_for_the_one_before = _alone(_one_waits)
test_a_background_save_that_fails_is_told_and_the_last_one_is_an_error = _alone(_one_fails)
test_a_bug_on_the_thread_is_raised_where_training_sees_it = _alone(_bug)
