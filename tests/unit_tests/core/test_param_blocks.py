"""Stretches of a parameter as boxes, and boxes in the logical tensors of a checkpoint."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.param_blocks import ParamBlocks, block_shards, boxes_of
from megatron.core.param_role import Init, ParamRole, Split, logical_shards

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_hold_the_elements_of_a_stretch_in_order(shape, data):
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(start, whole.numel()))
    boxes = list(boxes_of(shape, start, end))
    found = [
        whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
        for box in boxes
    ]
    flat = torch.cat([torch.empty(0, dtype=torch.int64), *(part.reshape(-1) for part in found)])
    assert flat.tolist() == list(range(start, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.integers(0, 3), st.booleans(), st.booleans(), st.data())
def test_blocks_of_owners_are_the_shards_of_the_whole(cuts, stacked, split, data):
    slices = Split(over="expt_tp", index=1, count=2, dim=0, parts=(4, 6)) if split else None
    role = ParamRole(
        init=Init(kind="zeros"),
        is_expert=stacked,
        expert_ids=(4, 2, 7) if stacked else None,
        expert_name="linear_fc1.weight",
        split=slices,
    )
    shape = (3, 5, 4) if stacked else (5, 4)
    whole = torch.arange(math.prod(shape)).view(shape)
    places = data.draw(st.lists(st.integers(0, whole.numel()), min_size=cuts, max_size=cuts))
    ends = [0, *sorted(places), whole.numel()]
    want: dict = {}
    for shard in logical_shards("bank.weight1", whole, role):
        for spot, value in _elements(shard):
            want[shard.name, shard.shape, spot] = value
    got: dict = {}
    for start, end in itertools.pairwise(ends):
        flat = whole.reshape(-1)[start:end]
        part = ParamBlocks.of_stretch(shape, start, flat)
        for shard in block_shards("bank.weight1", part, role):
            assert shard.tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            for spot, value in _elements(shard):
                assert (shard.name, shard.shape, spot) not in got
                got[shard.name, shard.shape, spot] = value
    assert got == want


def _elements(shard):
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shard.tensor.shape)).tolist():
        spot = tuple(a + b for a, b in zip(shard.offset, index, strict=True))
        yield spot, shard.tensor[tuple(index)].item()
