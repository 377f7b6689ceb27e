"""Gradients of a fully sharded model by their values: sums, never means, of every microbatch."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    TorchFullyShardedDataParallel,
)
from megatron.core.optimizer.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import Init, ParamRole, role_of, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from tests.helpers.ranks import run_ranks

ZEROS = Init(kind="zeros")


class Scale(nn.Module):
    """Multiplies by a weight of 0, [size]; its gradient is the sum of the input."""

    def __init__(self, size: int, role: ParamRole, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = set_role(nn.Parameter(torch.empty(size, 2, dtype=dtype)), role)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) + (self.weight.sum(1) * x.to(self.weight.dtype)).sum()


class Layer(nn.Module):
    """Dense parameters, one of them used on even ranks alone, and a bank of experts."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = Scale(5, ParamRole(init=ZEROS), dtype)  # 5 over 2 or 4 ranks: uneven, empty
        self.sometimes = Scale(5, ParamRole(init=ZEROS, decays=False), dtype)
        self.experts = Scale(4, ParamRole(init=ZEROS, is_expert=True), dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        if dist.get_rank() % 2 == 0:
            x = self.sometimes(x)
        return x.sum() + self.experts(x[:4]).sum()


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(dtype), Layer(dtype)])

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x) for layer in self.layers), torch.zeros((), dtype=x.dtype))


def wrapped(ep: int, dtype: torch.dtype) -> TorchFullyShardedDataParallel:
    layout = ParallelLayout(world_size=dist.get_world_size(), ep=ep)
    return TorchFullyShardedDataParallel(
        DistributedDataParallelConfig(use_torch_fsdp2=True),
        Model(dtype),
        pg_collection=ProcessGroupCollection.create(layout),
        device=torch.device("cpu"),
    )


def _gradient_of_one(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named(model)}


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def _sums(ep: int, dtype: torch.dtype) -> None:
    ddp = wrapped(ep, dtype)
    for _ in range(2):  # a step begins from zero again
        ddp.zero_grad_buffer()
        inputs = [torch.arange(5.0, dtype=dtype) + 1 + dist.get_rank() + 10 * i for i in range(3)]
        for x in inputs:
            with ddp.no_sync():
                ddp(x).backward()
        ddp.finish_grad_sync()
    mine: dict[str, Tensor] = {}
    for x in inputs:
        for name, grad in _gradient_of_one(Model(dtype), x).items():
            mine[name] = mine.get(name, torch.zeros((), dtype=torch.float64)) + grad.double()
    for name, param in ddp.trainable_parameters():
        is_expert = role_of(param).is_expert
        group = ddp.pg_collection.expt_dp if is_expert else ddp.pg_collection.dp_cp
        dist.all_reduce(mine[name], group=group)
        got = param.main_grad.full_tensor()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert mine[name].abs().max() > 0
        assert torch.equal(got.double(), mine[name]), (name, got, mine[name])


@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_gradients_are_sums_over_ranks_and_microbatches(ranks, ep):
    run_ranks(_sums, ranks, ep, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_wide(dtype):
    run_ranks(_sums, 2, 1, dtype)


def _elements(ep: int) -> None:
    ddp = wrapped(ep, torch.float64)
    held = sum(shard.weight.numel() for shard in ddp.shards)
    total = torch.tensor([held])
    dist.all_reduce(total)
    params = [param for _, param in ddp.trainable_parameters()]
    assert total.item() == sum(p.numel() * (ep if role_of(p).is_expert else 1) for p in params)
    kinds = {(shard.role.is_expert, shard.role.decays) for shard in ddp.shards}
    assert len(ddp.grad_buffers) == len(kinds) == 3


@pytest.mark.parametrize(("ranks", "ep"), [(2, 1), (4, 2)])
def test_every_element_is_on_one_rank(ranks, ep):
    run_ranks(_elements, ranks, ep)


def _step(config: OptimizerConfig) -> None:
    ddp = wrapped(1, torch.float64)
    optimizer = get_megatron_optimizer(config, ddp, pg_collection=ddp.pg_collection)
    if dist.get_rank() == 3:
        assert not any(s.weight.numel() for s in ddp.shards if not s.role.is_expert)
    ddp.zero_grad_buffer()
    ddp(torch.ones(5, dtype=torch.float64)).backward()
    ddp.finish_grad_sync()
    gradients = {name: p.main_grad.full_tensor() for name, p in ddp.trainable_parameters()}
    result = optimizer.step()
    norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-14)
    for name, param in ddp.trainable_parameters():
        moved = -0.1 * gradients[name]  # from 0
        torch.testing.assert_close(param.full_tensor().detach(), moved, rtol=1e-14, atol=0.0)


def test_a_rank_that_keeps_nothing_of_some_kind_steps_the_rest():
    config = OptimizerConfig(optimizer="sgd", lr=0.1, sgd_momentum=0.0, clip_grad=0.0)
    run_ranks(_step, 4, config)
