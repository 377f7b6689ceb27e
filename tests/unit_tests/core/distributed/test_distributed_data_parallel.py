import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.grad_sink import grad_sink_of
from megatron.core.param_role import role_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import TOLERANCES
from tests.unit_tests.core.distributed.stand_in import (
    EXPERTS,
    Oracle,
    StandIn,
    start,
    tokens_of,
    uses_side,
)

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, ep)


@pytest.mark.parametrize(("ranks", "ep"), LAYOUTS)
@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_of_every_layout_equal_those_of_one_process(ranks, ep, overlap):
    run_ranks(_gradients_equal_the_oracle, ranks, ep, overlap)


def _gradients_equal_the_oracle(ep, overlap):
    run, oracle = start(ep, overlap=overlap), Oracle()
    for step in range(2):
        run.backward(step)
        oracle.backward(step)
        want, got = oracle.pieces("grad"), run.pieces("main_grad")
        assert len(got) == 3 + 3 * EXPERTS // ep
        for key, grad in got.items():
            torch.testing.assert_close(grad, want[key], **TOLERANCES[torch.float64])
            assert grad.abs().max() > 0
        assert all(param.grad is None for param in run.model.parameters())


@pytest.mark.parametrize(("ranks", "ep"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlapped_reduction_equals_reduction_at_the_end_bit_for_bit(ranks, ep, dtype):
    run_ranks(_overlap_changes_no_bit, ranks, ep, dtype)


def _overlap_changes_no_bit(ep, dtype):
    plain, overlapped = start(ep, dtype), start(ep, dtype, overlap=True)
    launched = []
    original = overlapped.ddp._reducer._launch
    overlapped.ddp._reducer._launch = lambda bucket: launched.append(bucket) or original(bucket)
    for step in range(2):
        plain.backward(step)
        launched.clear()
        overlapped.backward(step)
        assert tuple(launched) == overlapped.ddp.bucket_layout.buckets
        for one, other in zip(plain.ddp.grad_buffers, overlapped.ddp.grad_buffers, strict=True):
            assert one.grad_data.dtype == torch.float32
            assert torch.equal(one.grad_data, other.grad_data)
            assert one.grad_data.abs().max() > 0


def test_a_rank_without_gradients_for_a_parameter_reduces_it_all_the_same():
    run_ranks(_one_rank_uses_the_side_matrix, 4)


def _one_rank_uses_the_side_matrix():
    run, oracle = start(2, overlap=True), Oracle()
    filled = []
    original = run.ddp._reducer.mark_filled
    run.ddp._reducer.mark_filled = lambda number: filled.append(number) or original(number)
    run.ddp.zero_grad_buffer()
    sample = dist.get_rank()  # only sample 0 uses it
    run.ddp(tokens_of(sample), uses_side(sample)).backward()
    run.ddp.finish_grad_sync()
    names = [name for name, _ in run.ddp.trainable_parameters()]
    assert ("side" in [names[number] for number in filled]) == (sample == 0)
    oracle.model(tokens_of(0), True).backward()
    torch.testing.assert_close(
        run.model.side.main_grad, oracle.model.side.grad, **TOLERANCES[torch.float64]
    )


def test_parameters_and_gradients_are_views_of_flat_buffers():
    run_ranks(_views_share_storage, 1)


def _views_share_storage():
    before = {
        name: p.detach().clone()
        for name, p in StandIn((0, 1, 2, 3), torch.bfloat16).named_parameters()
    }
    run = start(1, torch.bfloat16)
    for name, param in run.model.named_parameters():
        assert torch.equal(param, before[name])
        assert param.main_grad.shape == param.shape
        assert param.main_grad.dtype == torch.float32
        assert role_of(param) is not None
    kinds = {(b.layout.key.is_expert, b.layout.key.decays) for b in run.ddp.grad_buffers}
    assert len(kinds) == len(run.ddp.grad_buffers) == 4
    for buffer in run.ddp.grad_buffers:
        buffer.param_data.fill_(7.0)
        buffer.grad_data.fill_(8.0)
    for param in run.model.parameters():
        assert (param == 7.0).all()
        assert (param.main_grad == 8.0).all()


def test_a_tied_parameter_lies_once_in_the_buffer_and_counts_both_uses():
    run_ranks(_tied_counts_both_uses, 1)


def _tied_counts_both_uses():
    run = start(1)
    wrapped = DistributedDataParallel(
        DistributedDataParallelConfig(), StandInWithTwoNames(), pg_collection=run.pg
    )
    assert [name for name, _ in wrapped.trainable_parameters()].count("second") == 0
    wrapped.zero_grad_buffer()
    wrapped(3.0).backward()
    wrapped.finish_grad_sync()
    assert (wrapped.module.first.main_grad == 4.0).all()  # 1 of one use, 3 of the other


class StandInWithTwoNames(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = StandIn((0,), torch.float64).norm
        self.second = self.first

    def forward(self, factor):
        return self.first.sum() + factor * self.second.sum()


def test_a_second_backward_outside_no_sync_is_refused_with_overlap():
    run_ranks(_forgotten_no_sync, 1)


def _forgotten_no_sync():
    run = start(1, overlap=True)
    run.ddp(tokens_of(0), True).backward()
    with pytest.raises(AssertionError, match="no_sync"):
        run.ddp(tokens_of(0), True).backward()


def test_a_backward_after_the_sums_is_refused():
    run_ranks(_backward_after_finish, 1)


def _backward_after_finish():
    run = start(1)
    run.backward(0)
    with pytest.raises(AssertionError, match="zero_grad_buffer"):
        run.ddp(tokens_of(0), True).backward()


def test_parameters_with_bad_gradients_are_named():
    run_ranks(_names_bad_gradients, 1)


def _names_bad_gradients():
    run = start(1)
    run.backward(0)
    assert run.ddp.nonfinite_gradients() == []
    run.model.norm.main_grad[2] = float("inf")
    assert run.ddp.nonfinite_gradients() == ["norm"]


def test_frozen_parameters_stay_out_of_the_buffers():
    run_ranks(_frozen, 1)


def _frozen():
    run = start(1)
    model = StandIn((0,), torch.float64)
    model.side.requires_grad_(False)
    ddp = DistributedDataParallel(DistributedDataParallelConfig(), model, pg_collection=run.pg)
    assert "side" not in [name for name, _ in ddp.trainable_parameters()]
    assert not hasattr(model.side, "main_grad")


class _IntoSink(torch.autograd.Function):
    """x * weight, whose gradient goes where the parameter asks for it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.x, ctx.sink = x, grad_sink_of(weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        ctx.sink().add_(ctx.x * grad)
        return None, None


def _sink_fills_buckets(uses):
    run = start(1)
    wrapped = DistributedDataParallel(
        DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1),
        StandInWithTwoNames(),
        pg_collection=run.pg,
    )
    weight, launched = wrapped.module.first, []
    original = wrapped._reducer._launch
    wrapped._reducer._launch = lambda bucket: launched.append(bucket) or original(bucket)

    def loss():
        return sum(_IntoSink.apply(2.0, weight) for _ in range(uses)).sum() + 3.0 * weight.sum()

    sunk = 2.0 * uses
    for _ in range(2):
        wrapped.zero_grad_buffer()
        launched.clear()
        with wrapped.no_sync():
            loss().backward()
        assert not launched
        loss().backward()
        assert launched, "the last backward launches its bucket, without finish_grad_sync()"
        wrapped.finish_grad_sync()
        assert (weight.main_grad == 2 * (sunk + 3.0)).all()
        assert weight.grad is None
    with pytest.raises(AssertionError, match="after finish_grad_sync"):
        _IntoSink.apply(2.0, weight).sum().backward()


@pytest.mark.parametrize("uses", [1, 3])
def test_gradients_that_went_into_the_sink_fill_buckets_once_all_uses_are_in(uses):
    run_ranks(_sink_fills_buckets, 1, uses)


def _sink_alone():
    run = start(1)
    wrapped = DistributedDataParallel(
        DistributedDataParallelConfig(overlap_grad_reduce=True),
        StandInWithTwoNames(),
        pg_collection=run.pg,
    )
    wrapped.zero_grad_buffer()
    weight = wrapped.module.first
    _IntoSink.apply(2.0, weight).sum().backward()
    assert wrapped._reducer._next == len(wrapped.bucket_layout.buckets) == 1
    assert (weight.main_grad == 2.0).all()
    with pytest.raises(AssertionError, match="after its bucket was reduced"):
        _IntoSink.apply(2.0, weight).sum().backward()


def test_a_parameter_that_returns_no_gradient_at_all_fills_its_bucket():
    run_ranks(_sink_alone, 1)
