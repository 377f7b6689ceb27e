import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.staging import Staging
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import build, clear, fill, wrong_keys


def test_a_copy_stays_as_it_was_while_the_tensor_changes() -> None:
    live = {"model.a": torch.arange(6.0).view(2, 3)[:, 1:]}
    staging = Staging(None)
    copied = staging.copy(live)
    live["model.a"].zero_()
    assert copied["model.a"].tolist() == [[1, 2], [4, 5]]


def test_the_buffers_are_used_again_for_the_same_structure_only() -> None:
    staging = Staging(None)
    first = staging.copy({"model.a": torch.zeros(3)})["model.a"]
    again = staging.copy({"model.a": torch.ones(3)})["model.a"]
    assert again.data_ptr() == first.data_ptr()
    assert again.eq(1).all()
    other = staging.copy({"model.a": torch.ones(4), "model.b": torch.ones(2)})
    assert {key: tuple(tensor.shape) for key, tensor in other.items()} == {
        "model.a": (4,),
        "model.b": (2,),
    }
    assert staging.nbytes == 24


def _copied_once() -> None:
    ddp, optimizer = build(2, sharded=True)
    tensors = model_tensors(ddp.module) | optimizer_tensors(optimizer.named_state())
    fill(tensors)
    staging = Staging(dist.group.WORLD)
    copied = staging.copy(tensors)
    clear(tensors)
    assert wrong_keys(copied) == []
    shares = gather({key: tuple(tensor.shape) for key, tensor in copied.items()}, dist.group.WORLD)
    everything = gather(list(tensors), dist.group.WORLD)
    assert set().union(*shares) == set().union(*everything)
    held = gather(staging.nbytes, dist.group.WORLD)
    state = sum(4 * 3 * (30 + 7 + 4 * 48) for _ in "1") + 32  # weights, two moments; counts
    assert sum(held) == state, "what two ranks hold is copied by one"
    assert max(held) < 0.6 * state


def test_ranks_copy_what_they_will_write_and_no_more() -> None:
    run_ranks(_copied_once, 2)
