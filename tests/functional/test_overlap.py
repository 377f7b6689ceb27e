"""Overlap: what is launched before the computation that hides it, and lands after. No clock."""

import time

import pytest
import torch
import torch.distributed as dist

from megatron.core.collectives import all_gather_single, start_all_gather, start_reduce_scatter
from tools.bench.overlap_cases import (
    Times,
    expert_all_to_all,
    gradient_reduce,
    parameter_gather,
)
from tools.bench.slow_group import BACKEND, LINK, register
from tools.layouts.ranks import run_ranks

LAYERS = 4
AT_ONCE = Times(compute=0.0, transfer=0.0)
SHARED = "shared experts, "


def on_slow_ranks(body, *args):
    register()
    run_ranks(body, 2, *args, backend=BACKEND)


def events_of_step(case, overlap, steps=1):
    """Return what happened in the last step, as words: ``all_reduce 0 launch``."""
    for _ in range(steps):
        LINK.events.clear()
        case.step(overlap)
    first: dict[str, int] = {}
    return [
        f"{e.of} {e.number - first.setdefault(e.of, e.number)} {e.what}" if e.of else e.what
        for e in LINK.events
    ]


def _gradients(overlap):
    case = gradient_reduce(AT_ONCE, LAYERS, 8)
    events = events_of_step(case, overlap)
    place = {event: n for n, event in enumerate(events)}
    reduces = [e for e in events if e.startswith("all_reduce") and e.endswith("launch")]
    assert len(reduces) == LAYERS
    for bucket in range(LAYERS):  # bucket 0 is that of the last layer
        launch, land = place[f"all_reduce {bucket} launch"], place[f"all_reduce {bucket} land"]
        assert land > place["layer 0 backward"]
        if overlap and bucket < LAYERS - 1:
            below = LAYERS - 2 - bucket
            assert place[f"layer {below + 1} backward"] < launch < place[f"layer {below} backward"]
        else:
            assert launch > place["layer 0 backward"]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_bucket_is_reduced_under_the_backward_of_the_layers_below(overlap):
    on_slow_ranks(_gradients, overlap)


def _weights(overlap):
    case = parameter_gather(AT_ONCE, LAYERS, 64)
    case.step(overlap)
    launched = [e for e in LINK.events if e.of == "all_gather" and e.size_bytes == 4 * 64 * 64]
    assert sum(e.what == "launch" for e in launched) == LAYERS
    assert sum(e.what == "land" for e in launched) == (0 if overlap else LAYERS)
    LINK.events.clear()
    case.step(overlap)
    first = [e.what for e in LINK.events if e.of != "reduce_scatter"][: 2 * LAYERS]
    forwards = [f"layer {n} forward" for n in range(LAYERS)]
    if overlap:  # each layer waits for its own weights, and no more
        assert first == [what for forward in forwards for what in ("land", forward)]
    else:
        assert first[:LAYERS] == forwards


@pytest.mark.parametrize("overlap", [False, True])
def test_weights_travel_under_the_forward_until_their_layer_is_called(overlap):
    on_slow_ranks(_weights, overlap)


def _rows(overlap):
    events = events_of_step(expert_all_to_all(AT_ONCE, tokens=16, width=8), overlap, steps=2)
    halves = [n for n, e in enumerate(events) if e.startswith(SHARED)]
    assert [events[n] for n in halves] == [
        f"{SHARED}first half forward",
        f"{SHARED}second half forward",
        f"{SHARED}second half backward",
        f"{SHARED}first half backward",
    ]
    in_the_air = [_under_way(events[:n]) for n in halves]
    assert all(in_the_air) if overlap else not any(in_the_air)


def _under_way(events):
    sent = [e for e in events if e.startswith("all_to_all")]
    return sum(e.endswith("launch") for e in sent) - sum(e.endswith("land") for e in sent)


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_travel_under_both_halves_of_the_shared_experts(overlap):
    on_slow_ranks(_rows, overlap)


def _same_bits():
    for make, sizes in (
        (gradient_reduce, (LAYERS, 8)),
        (parameter_gather, (LAYERS, 64)),
        (expert_all_to_all, (16, 8)),
    ):
        case = make(AT_ONCE, *sizes)
        for overlap in (False, True, True, False):
            case.step(overlap)
        plain, overlapped = case.result(False), case.result(True)
        assert len(plain) == len(overlapped) > 1
        assert all(torch.equal(a, b) for a, b in zip(plain, overlapped, strict=True))


def test_overlap_changes_no_bit_where_results_land_late():
    on_slow_ranks(_same_bits)


def _late():
    rank, group = dist.get_rank(), dist.group.WORLD
    LINK.seconds_per_byte, start = {"all_reduce": 0.05 / 16}, time.perf_counter()
    mine = torch.arange(4.0) + 10 * rank
    both = [torch.arange(4.0), torch.arange(4.0) + 10]
    summed, whole, part = mine.clone(), torch.zeros(8), torch.zeros(2)
    rows = torch.zeros(4)
    works = [
        dist.all_reduce(summed, group=group, async_op=True),
        start_all_gather(whole, mine, group=group),
        start_reduce_scatter(part, mine, group=group),
        dist.all_to_all_single(rows, mine, [1, 3], [1, 3], group=group, async_op=True)
        if rank == 0
        else dist.all_to_all_single(rows, mine, [3, 1], [3, 1], group=group, async_op=True),
    ]
    assert torch.equal(summed, mine)
    assert not whole.any()
    assert not part.any()
    assert not rows.any()
    for work in works:
        work.wait()
        work.wait()
    assert time.perf_counter() - start > 0.05
    assert torch.equal(summed, sum(both))
    assert torch.equal(whole, torch.cat(both))
    assert torch.equal(part, sum(both)[2 * rank : 2 * rank + 2])
    sent = [torch.cat([both[0][:1], both[1][:3]]), torch.cat([both[0][1:], both[1][3:]])]
    assert torch.equal(rows, sent[rank])
    again = torch.zeros(8)
    all_gather_single(again, mine, group=group)
    assert torch.equal(again, torch.cat(both))


def test_collectives_of_the_double_are_real_and_land_when_waited_for():
    on_slow_ranks(_late)
