import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron.core.param_role import (
    Init,
    ParamRole,
    Split,
    deferred_init,
    logical_shards,
    logical_tensors,
    set_role,
)


@pytest.mark.parametrize(("kind", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_a_parameter_is_drawn_when_it_gets_its_role(kind, value):
    param = nn.Parameter(torch.full((4,), float("nan")))
    assert set_role(param, ParamRole(init=Init(kind=kind))).tolist() == [value] * 4


def test_normal_weights_have_their_spread_and_the_global_seed_decides_them():
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(set_role(nn.Parameter(torch.empty(10_000)), ParamRole(init=Init(std=0.3))))
    assert torch.equal(*draws)
    assert draws[0].std().item() == pytest.approx(0.3, rel=0.05)


def test_a_deferred_parameter_is_left_alone_and_no_generator_moves():
    before = torch.get_rng_state()
    with deferred_init():
        param = set_role(nn.Parameter(torch.full((4,), 7.0)), ParamRole(init=Init()))
    assert param.tolist() == [7.0] * 4
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stacked_parameter_has_one_logical_tensor_for_each_global_expert():
    role = ParamRole(init=Init(), expert_ids=(4, 5), expert_name="linear_fc1.weight")
    stacked = torch.arange(6.0).view(2, 3)
    named = dict(logical_tensors("mlp.experts.weight1", stacked, role))
    assert list(named) == [f"mlp.experts.local_experts.{e}.linear_fc1.weight" for e in (4, 5)]
    assert named["mlp.experts.local_experts.5.linear_fc1.weight"].tolist() == [3.0, 4.0, 5.0]


def _split(index: int, count: int, parts: tuple[int, ...], dim: int = 0) -> Split:
    return Split(over="expt_tp", index=index, count=count, dim=dim, parts=parts)


@given(
    st.integers(1, 4),
    st.integers(0, 1),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from([None, (2, 5)]),
)
def test_the_slices_of_all_ranks_tile_every_logical_tensor(count, dim, units, experts):
    parts = tuple(unit * count for unit in units)
    shape = (sum(parts), 3) if dim == 0 else (3, sum(parts))
    whole, times = torch.zeros(shape), torch.zeros(shape)
    for index in range(count):
        split = _split(index, count, parts, dim)
        role = ParamRole(init=Init(), split=split, expert_ids=experts, expert_name="w")
        stack = () if experts is None else (len(experts),)
        local = torch.full((*stack, *split.local_shape(shape)), float(index))
        assert split.whole_shape(split.local_shape(shape)) == shape
        shards = list(logical_shards("bank.weight", local, role))
        assert len({shard.name for shard in shards}) == len(experts or (0,))
        for shard in shards:
            assert shard.shape == shape
            assert (shard.tensor == index).all()
            whole[shard.region] = shard.tensor
            times[shard.region] += 1
    assert (times == len(experts or (0,))).all()
    ranks = torch.cat([torch.arange(count).repeat_interleave(unit) for unit in units])
    assert torch.equal(whole.amax(dim=1 - dim), ranks.float())


def test_gate_and_up_are_sliced_each_on_its_own():
    role = ParamRole(init=Init(), split=_split(1, 2, (4, 4)))
    shards = list(logical_shards("fc1", torch.arange(4.0), role))
    assert [shard.offset for shard in shards] == [(2,), (6,)]
    assert [shard.tensor.tolist() for shard in shards] == [[0.0, 1.0], [2.0, 3.0]]
    assert role.split_over == "expt_tp"


def test_a_slice_of_one_is_the_whole_tensor():
    role = ParamRole(init=Init(), split=_split(0, 1, (2, 2)))
    assert role.split_over is None
    (shard,) = logical_shards("fc1", torch.arange(4.0), role)
    assert (shard.shape, shard.offset) == ((4,), (0,))


def test_slices_that_would_differ_are_a_bug():
    with pytest.raises(AssertionError, match="slices differ"):
        _split(0, 2, (3, 3))
