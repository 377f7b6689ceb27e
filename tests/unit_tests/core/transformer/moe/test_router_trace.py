"""The routing trace: what is recorded, how it is written, read and bounded."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron.core.errors import DataError
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.capacity import apply_router_token_dropping
from megatron.core.transformer.moe.router_trace import RouterTracer, TraceLimits
from megatron.core.transformer.moe.router_trace_files import (
    RoutingTrace,
    StepTrace,
    TraceIndex,
    next_start,
    rank_folder,
    start_name,
    write_index,
    write_step,
)
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)

S, B = 5, 2


class _Batch(NamedTuple):
    tokens: torch.Tensor
    sample_ids: tuple[int, ...]
    padding_mask: torch.Tensor | None = None


def _batch(first: int, padding: torch.Tensor | None = None) -> _Batch:
    ids = tuple(range(first, first + B))
    return _Batch(torch.arange(S).repeat(B, 1) + 100 * torch.tensor(ids)[:, None], ids, padding)


def _tracer(folder: Path, **options: Any) -> RouterTracer:
    values: dict[str, Any] = {
        "moe_layers": [1],
        "num_experts": [NUM_EXPERTS],
        "topk": [2],
        "limits": TraceLimits(),
    }
    values |= options
    start = folder / start_name(1, 0)
    layers = {name: values[name] for name in ("moe_layers", "num_experts", "topk")}
    write_index(start, TraceIndex(first_step=0, world_size=1, **layers))
    return RouterTracer(start, 0, **values)


def _layer(folder: Path, factor: float | None) -> None:
    config = moe_config(moe_expert_capacity_factor=factor)
    groups = make_groups(1)
    layer = make_layer(config, groups, make_reference(config))
    tracer = _tracer(folder)
    want = []
    for microbatch in range(2):
        tokens = make_tokens(S * B, torch.float32, microbatch).detach().view(S, B, H)
        context = ForwardContext(microbatch=microbatch, router_tracer=tracer)
        for _recompute in range(2):
            layer(tokens, context)
        want.append(layer.router(tokens, ForwardContext()))
    tracer.advance_step(1, [_batch(6), _batch(2)])
    trace = RoutingTrace(folder)
    assert trace.steps == [1]
    assert trace.num_experts(1) == NUM_EXPERTS
    got = trace.read(1)
    assert got.sample_ids.tolist() == [2, 3, 6, 7], "ordered by sample"
    assert got.tokens.tolist() == [[100 * n + i for i in range(S)] for n in (2, 3, 6, 7)]
    assert not got.padding.any()
    assert (got.experts[1].dtype, got.weights[1].dtype) == (np.uint8, np.float16)
    dropped = 0
    for row, number in enumerate(got.sample_ids.tolist()):
        microbatch, sample = (0, number - 6) if number >= 6 else (1, number - 2)
        routing = want[microbatch]
        kept = routing.probs
        if factor is not None:
            kept = apply_router_token_dropping(*routing, 2, factor).probs
        for place in range(S):
            token = place * B + sample
            chosen = got.experts[1][row, place].tolist()
            assert sorted(chosen) == routing.routing_map[token].nonzero().flatten().tolist()
            weights = kept[token, chosen].to(torch.float16)
            assert got.weights[1][row, place].tolist() == weights.tolist()
            assert weights[0] >= weights[1], "by falling weight"
            dropped += int((weights == 0).sum())
    assert (dropped > 0) == (factor is not None)


@pytest.mark.parametrize("factor", [None, 0.5])
def test_a_trace_holds_what_each_token_chose_once(factor, tmp_path):
    run_ranks(_layer, 1, tmp_path, factor)


def _record(tracer: RouterTracer, layer: int, num_experts: int, chosen: list[list[int]]) -> None:
    routing_map = torch.zeros(len(chosen), num_experts, dtype=torch.bool)
    for token, experts in enumerate(chosen):
        routing_map[token, experts] = True
    probs = routing_map * torch.linspace(0.1, 0.9, num_experts)
    tracer.record_indices(layer, 0, probs, routing_map)


def test_layers_may_differ_and_tokens_may_have_fewer_experts(tmp_path):
    tracer = _tracer(tmp_path, moe_layers=[0, 2], num_experts=[255, 40_000], topk=[2, 3])
    _record(tracer, 0, 255, [[254, 3], [7]] * S)
    _record(tracer, 2, 40_000, [[39_999, 1, 35_000], []] * S)
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, 3:] = True
    tracer.advance_step(9, [_batch(0, mask)])
    got = RoutingTrace(tmp_path).read(9)
    assert got.experts[0][0, 0].tolist() == [254, 3]
    assert got.experts[0][1, 0].tolist() == [7, 255], "255 is no expert"
    assert got.experts[2].dtype == np.uint16
    assert got.experts[2][0, 1].tolist() == [39_999, 35_000, 1]
    assert got.experts[2][1, 1].tolist() == [65_535] * 3
    assert got.weights[2][1, 1].tolist() == [0.0] * 3
    assert got.padding.tolist() == mask.tolist()


def test_a_trace_ends_at_its_limits(tmp_path):
    for name, limits, steps in (
        ("steps", TraceLimits(max_steps=2), [1, 2]),
        ("bytes", TraceLimits(max_bytes=4000), [1, 2]),
        ("none left", TraceLimits(max_steps=0), []),
    ):
        folder = tmp_path / name
        tracer = _tracer(folder, limits=limits)
        for step in range(1, 5):
            _record(tracer, 1, NUM_EXPERTS, [[1, 2]] * (S * B))
            tracer.advance_step(step, [_batch(0)])
        assert not tracer.is_on
        assert RoutingTrace(folder).steps == steps, name
        assert RoutingTrace(folder).bytes_of(0) <= (limits.max_bytes or 1e9)


def test_a_disk_that_cannot_be_written_ends_the_trace_and_not_the_run(tmp_path, caplog):
    tracer = _tracer(tmp_path)
    tracer.folder.rmdir()
    _record(tracer, 1, NUM_EXPERTS, [[1, 2]] * (S * B))
    tracer.advance_step(1, [_batch(0)])
    assert not tracer.is_on
    assert "the routing trace ends" in caplog.text


def _write(folder: Path, number: int, first: int, last: int, world_size: int = 1) -> None:
    """Write steps ``first + 1`` to ``last`` of a start; expert ids tell which start it was."""
    start = folder / start_name(number, first)
    layers = {"moe_layers": [0], "num_experts": [8], "topk": [1]}
    write_index(start, TraceIndex(first_step=first, world_size=world_size, **layers))
    for rank in range(world_size):
        rank_folder(start, rank).mkdir(exist_ok=True)
        for step in range(first + 1, last + 1):
            part = StepTrace(
                sample_ids=np.array([world_size - rank]),
                tokens=np.full((1, 3), rank, dtype=np.uint16),
                padding=np.zeros((1, 3), dtype=np.bool_),
                experts={0: np.full((1, 3, 1), number, dtype=np.uint8)},
                weights={0: np.ones((1, 3, 1), dtype=np.float16)},
            )
            write_step(rank_folder(start, rank), step, part)


def test_a_resumed_run_goes_on_and_replaces_the_steps_it_makes_again(tmp_path):
    _write(tmp_path, 1, 0, 5)
    assert next_start(tmp_path, 3) == "start_0002_from_00000003"
    _write(tmp_path, 2, 3, 6, world_size=2)
    trace = RoutingTrace(tmp_path)
    assert trace.steps == [1, 2, 3, 4, 5, 6]
    assert [int(trace.read(step).experts[0][0, 0, 0]) for step in trace.steps] == [1, 1, 1, 2, 2, 2]
    assert trace.read(4).tokens[:, 0].tolist() == [1, 0], "both ranks, by sample"
    assert trace.bytes_of(0) > trace.bytes_of(1) > 0
    _write(tmp_path, 3, 0, 1)  # a fresh start
    assert RoutingTrace(tmp_path).steps == [1]


def test_a_folder_that_is_no_trace_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no routing trace"):
        RoutingTrace(tmp_path)
    _write(tmp_path, 1, 0, 1)
    path = tmp_path / start_name(1, 0) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    with pytest.raises(DataError, match="format 7; this version reads 1"):
        RoutingTrace(tmp_path)
