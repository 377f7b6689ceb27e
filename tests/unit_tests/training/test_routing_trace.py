"""The routing trace of a run: the same in every layout, continued by a resumed run, bounded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.router_trace import TraceLimits
from megatron.core.transformer.moe.router_trace_files import RoutingTrace
from megatron.training.routing_trace import open_tracer
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import SAMPLES, SEQ, tiny_batches, tiny_run


def _traced(run: Run, iteration: int) -> Run:
    return replace(run, router_tracer=open_tracer(run, iteration))


def _train(folder: Path, flags: str, first: int, last: int) -> None:
    run = _traced(tiny_run(f"{flags} --moe-routing-trace-path {folder}"), first)
    state, data = TrainState(iteration=first), tiny_batches(run)
    while state.iteration < last:
        train_step(run, state, data)
        state.iteration += 1
        assert run.moe_metrics.report(run.world.pg_collection).tokens_per_expert.any()


@pytest.mark.parametrize(("world_size", "ep", "size"), [(1, 1, 4), (2, 2, 2), (4, 2, 1), (4, 1, 2)])
def test_every_layout_writes_the_same_choices_of_the_same_samples(world_size, ep, size, tmp_path):
    run_ranks(_train, 1, tmp_path / "one", "--micro-batch-size 2", 0, 2)
    flags = f"--micro-batch-size {size} --expert-model-parallel-size {ep}"
    run_ranks(_train, world_size, tmp_path / "many", flags, 0, 2)
    one, many = RoutingTrace(tmp_path / "one"), RoutingTrace(tmp_path / "many")
    assert many.index.world_size == world_size
    assert one.steps == many.steps == [1, 2]
    for step in one.steps:
        want, got = one.read(step), many.read(step)
        assert got.sample_ids.tolist() == list(range(SAMPLES))
        assert np.array_equal(got.tokens, want.tokens)
        assert got.experts.keys() == {0, 1}
        for layer, experts in want.experts.items():
            assert experts.shape == (SAMPLES, SEQ, 2)
            assert np.array_equal(got.experts[layer], experts)
            np.testing.assert_allclose(got.weights[layer], want.weights[layer], atol=1e-3)
            assert np.allclose(got.weights[layer].sum(axis=2, dtype=np.float32), 1.0, atol=2e-3)


def test_a_resumed_run_goes_on_without_touching_what_is_there(tmp_path):
    flags = "--micro-batch-size 2 --moe-routing-trace-max-training-iters 5"
    run_ranks(_train, 2, tmp_path, flags, 0, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    assert len(before) == 6
    run_ranks(_train, 2, tmp_path, flags, 2, 9)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert RoutingTrace(tmp_path).steps == [1, 2, 3, 4, 5], "five steps in all"


def test_where_experts_choose_all_choices_are_written(tmp_path):
    flags = (
        "--micro-batch-size 2 --moe-router-type expert_choice --moe-expert-capacity-factor 1.5 "
        "--moe-router-load-balancing-type aux_loss"
    )
    run_ranks(_train, 2, tmp_path, flags, 0, 1)
    trace = RoutingTrace(tmp_path)
    part = trace.read(1)
    capacity = 2 * SEQ * 2 * 3 // (4 * 2)  # tokens of a microbatch, top-2 of 4, 1.5
    for experts in part.experts.values():
        assert experts.shape == (SAMPLES, SEQ, 4)
        counts = np.bincount(experts[experts != 255], minlength=4)
        assert counts.tolist() == [SAMPLES // 2 * capacity] * 4
        chosen = (experts != 255).sum(axis=2)
        assert chosen.max() > 3 > chosen.min(), "the case was meant to be uneven"
    assert trace.index.topk == [4, 4]


def _bounded(folder: Path) -> None:
    flags = f"--micro-batch-size 2 --moe-routing-trace-path {folder} --moe-routing-trace-max-mb 1"
    run, state = _traced(tiny_run(flags), 0), TrainState()
    assert run.router_tracer._limits.max_bytes == 1_000_000
    run.router_tracer._limits = TraceLimits(max_bytes=20_000)
    data = tiny_batches(run)
    while run.is_tracing:
        train_step(run, state, data)
        state.iteration += 1
    assert state.iteration > 2


def test_all_ranks_end_at_the_same_step_when_the_space_is_used(tmp_path):
    run_ranks(_bounded, 2, tmp_path)
    trace = RoutingTrace(tmp_path)
    assert all(len(trace.read(step).sample_ids) == SAMPLES for step in trace.steps)
    assert 10_000 < trace.bytes_of(1) <= 20_000


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    run_ranks(_late, 2, tmp_path / "file" / "below")


def _late(folder: Path) -> None:
    run = tiny_run("")
    run.config.logging.moe_routing_trace_path = str(folder)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_tracer(run, 0)
    dist.barrier()


def _off() -> None:
    run = _traced(tiny_run(""), 0)
    assert run.router_tracer is None
    assert not run.is_tracing


def test_without_a_path_nothing_is_traced():
    run_ranks(_off, 1)
