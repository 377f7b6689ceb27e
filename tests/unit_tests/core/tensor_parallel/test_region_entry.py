"""Collectives of backward are launched before the weight's product and awaited after it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import Init
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.cross_entropy import linear_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_rows
from megatron.core.tensor_parallel.region_entry import RegionEntry
from megatron.core.weight_grad_queue import WeightGradQueue
from tests.helpers.late_collectives import late_collectives
from tests.helpers.ranks import run_ranks

S, B, H, OUT, VOCAB = 8, 3, 10, 14, 12

PLAIN = ["input", "launch all_reduce", "weight", "wait all_reduce"]
SHARED = [
    "launch all_gather",
    "input",
    "launch all_to_all_single",
    "wait all_gather",
    "weight",
    "wait all_to_all_single",
]


class _Products(TorchDispatchMode):
    """Notes each matrix product: of the weight's shape, or another."""

    def __init__(self, events: list[str], *weights: Tensor) -> None:
        super().__init__()
        self.events, self.shapes = events, {weight.shape for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm_"):
            self.events.append("weight" if result.shape in self.shapes else "input")
        return result


def _input(shared: bool) -> Tensor:
    """The same on both ranks; with sequence parallelism this rank's share of it."""
    whole = torch.randn(S, B, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = whole.chunk(2)[dist.get_rank()] if shared else whole
    return mine.clone().requires_grad_()


def _entered(x: Tensor, shared: bool) -> Tensor:
    """What the products of all ranks read; its gradient is reduced as a node of its own."""
    if shared:
        return all_gather_rows(dist.group.WORLD, x, [S // 2] * 2)
    out = x.view_as(x)
    out.register_hook(lambda grad: _summed(grad.clone()))
    return out


def _summed(grad: Tensor) -> Tensor:
    dist.all_reduce(grad)
    return grad


def _column(shared: bool) -> tuple[ProcessGroupCollection, ColumnParallelLinear]:
    groups = ProcessGroupCollection.create(ParallelLayout(world_size=2, tp=2))
    options = {"init": Init(std=1.0), "dtype": torch.float64, "sequence_parallel": shared}
    torch.manual_seed(dist.get_rank())
    return groups, ColumnParallelLinear(H, OUT, pg_collection=groups, **options)


def _layer(shared: bool) -> None:
    _, layer = _column(shared)
    x, twin, events = _input(shared), _input(shared), []
    with late_collectives(events.append), _Products(events, layer.weight):
        out = layer(x)[0].sin()
        events.clear()
        out.sum().backward()
    assert events == (SHARED if shared else PLAIN)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    nn.functional.linear(_entered(twin, shared), weight, bias).sin().sum().backward()
    for got, want in ((x, twin), (layer.weight, weight), (layer.bias, bias)):
        assert torch.equal(got.grad, want.grad)


def _loss(shared: bool) -> None:
    torch.manual_seed(dist.get_rank())
    weight = torch.randn(VOCAB // 2, H, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCAB, (S, B), generator=torch.Generator().manual_seed(2))
    entry = RegionEntry(dist.group.WORLD, shared)
    x, twin, events = _input(shared), _input(shared), []
    with late_collectives(events.append), _Products(events, weight):
        loss = linear_cross_entropy(x, weight, labels, entry).square().sum()
        events.clear()
        loss.backward()
    assert events == (SHARED if shared else PLAIN)
    logits = nn.functional.linear(_entered(twin, shared), weight.detach())
    every = [torch.empty_like(logits) for _ in range(2)]
    dist.all_gather(every, logits.detach())
    every[dist.get_rank()] = logits
    losses = nn.functional.cross_entropy(
        torch.cat(every, -1).flatten(0, 1), labels.flatten(), reduction="none"
    )
    losses.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("body", [_layer, _loss])
def test_the_gradient_travels_under_the_weight_product(body, shared):
    run_ranks(body, 2, shared)


def _later(shared: bool) -> None:
    groups, layer = _column(shared)
    wrapped = DistributedDataParallel(
        DistributedDataParallelConfig(), nn.ModuleList([layer]), pg_collection=groups
    )
    x, events, queue = _input(shared), [], WeightGradQueue()
    wrapped.zero_grad_buffer()
    (layer(x)[0].sin() + layer(2.0 * x)[0].cos()).sum().backward()
    want = [p.main_grad.clone() for p in layer.parameters()]
    wrapped.finish_grad_sync()
    wrapped.zero_grad_buffer()
    with late_collectives(events.append), _Products(events, layer.weight):
        out = (layer(x)[0].sin() + layer(2.0 * x)[0].cos()).sum()
        events.clear()
        with queue.collecting():
            out.backward()
        one = "all_to_all_single" if shared else "all_reduce"
        assert events == ["input", f"launch {one}", f"wait {one}"] * 2, "nothing to compute yet"
        events.clear()
        queue.run()
    gathers = ["launch all_gather"] * 2
    late = [*gathers, "wait all_gather", "weight", "wait all_gather", "weight"]
    assert events == (late if shared else ["weight"] * 2), "the second is fetched under the first"
    wrapped.finish_grad_sync()
    for param, gradient in zip(layer.parameters(), want, strict=True):
        assert torch.equal(param.main_grad, gradient)


@pytest.mark.parametrize("shared", [False, True])
def test_put_off_weight_gradients_gather_their_input_one_ahead(shared):
    run_ranks(_later, 2, shared)


def _kept(shared: bool) -> None:
    _, layer = _column(shared)
    x, saved = _input(shared), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sorted(saved) == sorted([(S // 2 if shared else S, B, H), (OUT // 2, H)])


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_share_of_the_input_is_kept(shared):
    run_ranks(_kept, 2, shared)


def _frozen(shared: bool) -> None:
    _, layer = _column(shared)
    layer.weight.requires_grad_(False)
    x, events = _input(shared), []
    with late_collectives(events.append), _Products(events, layer.weight):
        out = layer(x)[0].sin().sum()
        events.clear()
        out.backward()
    one = "all_to_all_single" if shared else "all_reduce"
    assert events == ["input", f"launch {one}", f"wait {one}"]
    assert x.grad is not None


@pytest.mark.parametrize("shared", [False, True])
def test_a_frozen_weight_gathers_nothing(shared):
    run_ranks(_frozen, 2, shared)
