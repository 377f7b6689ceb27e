"""What is recorded: samples by content, blocks of all ranks, lines that a kill cut short."""

from pathlib import Path

import pytest
import torch

from megatron.core.param_role import LogicalShard
from megatron.training.datasets.batch import Batch
from tests.helpers.ranks import run_ranks
from tests.unit_tests.tools.resume.records_made_by_hand import RANKS, Run
from tests.unit_tests.training.tiny_run import tiny_run
from tools.resume.compare import bits
from tools.resume.record_names import steps_file
from tools.resume.recorder import fingerprints
from tools.resume.records import read_record, steps_done
from tools.resume.state_files import SavedState, live_blocks, write_state

SEQ = 8


def batch(tokens: torch.Tensor) -> Batch:
    return Batch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        loss_mask=torch.ones(tokens.shape),
        position_ids=torch.arange(SEQ).expand(tokens.shape),
        attention_mask=None,
        sample_ids=tuple(range(len(tokens))),
    )


def test_a_fingerprint_tells_content_and_order_and_adds_up_over_slices() -> None:
    tokens = torch.randint(0, 100, (3, SEQ), generator=torch.Generator().manual_seed(1))
    whole = batch(tokens)
    prints = fingerprints(whole)
    assert prints == fingerprints(whole)
    assert len(set(prints)) == 3
    other = tokens.clone()
    other[0, [2, 3]] = other[0, [3, 2]]
    assert fingerprints(batch(other))[0] != prints[0]
    assert fingerprints(batch(other))[1:] == prints[1:]
    slices = [fingerprints(whole.of_positions(rank, 2)) for rank in range(2)]
    assert [sum(pair) % 2**64 for pair in zip(*slices, strict=True)] == [p % 2**64 for p in prints]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    record = Run(begin=0).write(tmp_path / "run")
    assert steps_done(record.folder) == 4
    with (record.folder / steps_file(0)).open("a") as stream:
        stream.write('{"event": "step", "iteration": 5, "sam')
    assert steps_done(record.folder) == 4
    assert read_record(record.folder, RANKS).iterations == [1, 2, 3, 4]
    assert steps_done(tmp_path / "nothing") == 0


def test_blocks_of_all_ranks_make_the_tensor_again_in_every_dtype(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(6, 4),
        "b": torch.randn(6, 4).bfloat16(),
        "c": torch.arange(24).view(6, 4),
        "d": torch.tensor([torch.nan, -0.0]).repeat(6, 2),
    }
    for rank in range(3):
        rows = slice(2 * rank, 2 * rank + 2)
        blocks = [
            LogicalShard(name, tensor[rows], tuple(tensor.shape), (2 * rank, 0))
            for name, tensor in tensors.items()
        ]
        scalar = LogicalShard("e", torch.tensor(3.5), (), ())
        write_state(tmp_path, rank, [*blocks, scalar])
    state = SavedState(tmp_path)
    assert state.names() == ["a", "b", "c", "d", "e"]
    for name, tensor in tensors.items():
        whole, is_tiled = state.whole(name)
        assert is_tiled
        assert torch.equal(bits(whole), bits(tensor))
    assert state.whole("e")[0].item() == 3.5
    assert state.facts("b") == "bfloat16 [6, 4]"


def test_blocks_that_leave_a_hole_do_not_tile(tmp_path: Path) -> None:
    write_state(tmp_path, 0, [LogicalShard("a", torch.ones(2, 3), (4, 3), (0, 0))])
    whole, is_tiled = SavedState(tmp_path).whole("a")
    assert not is_tiled
    assert whole[:2].eq(1).all()
    assert whole[2:].eq(0).all()


LAYOUTS = {
    "sharded": "--use-distributed-optimizer --expert-model-parallel-size 2",
    "fully sharded": "--use-torch-fsdp2",
    "slices": "--tensor-model-parallel-size 2 --sequence-parallel --padded-vocab-size 128",
}


def _write(folder: Path, flags: str) -> None:
    run = tiny_run(f"--moe-router-score-function sigmoid --moe-router-enable-expert-bias {flags}")
    write_state(folder, run.world.rank, live_blocks(run))


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_tells_the_same_tensors_whole_and_by_the_same_names(
    tmp_path: Path, flags: str
) -> None:
    run_ranks(_write, 1, tmp_path / "one", "")
    run_ranks(_write, 2, tmp_path / "two", flags)
    one, two = SavedState(tmp_path / "one"), SavedState(tmp_path / "two")
    saved = [name for name in one.names() if not name.startswith("scratch.")]
    assert [name for name in two.names() if not name.startswith("scratch.")] == saved
    kinds = {name.partition(".")[0] for name in saved}
    assert kinds == {"weight", "buffer", "exp_avg", "exp_avg_sq"}
    for name in saved:
        whole, is_tiled = two.whole(name)
        assert is_tiled, name
        assert torch.equal(whole, one.whole(name)[0]), name  # drawn by global names
