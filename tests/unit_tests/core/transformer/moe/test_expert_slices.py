"""Experts that several ranks share: what slices hold, compute and learn adds up to the whole."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.replica_check import ReplicaError, check_replicas
from megatron.core.optimizer.clip_grads import global_grad_norm, owned_gradients
from megatron.core.param_role import logical_shards, role_of
from megatron.core.tensor_parallel.weight_init import init_weights, tensor_hashes
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from megatron.core.transformer.precision import compute_dtype
from tests.helpers.ranks import run_ranks
from tests.helpers.whole_tensors import whole_tensors
from tests.reference.activations import OPTIONS
from tests.unit_tests.core.transformer.moe.layers import H, make_groups, moe_config

SIZES = (3, 0, 18, 1)
SHAPES = [
    {"swiglu": True, "add_bias_linear": True},
    {"swiglu": False, "add_bias_linear": True},
    {"swiglu": True},
    {"swiglu": False, "add_mlp_bias": True, **OPTIONS["gpt_oss"]},
]


class GroupedProducts(GroupedMLP):
    """The path of a GPU, on any device."""

    def forward(self, permuted_local_hidden_states, tokens_per_expert, permuted_probs):
        probs = permuted_probs.to(compute_dtype(permuted_local_hidden_states.dtype))
        return self.grouped_experts(permuted_local_hidden_states, tokens_per_expert, probs), None


BANKS = [GroupedMLP, GroupedProducts, SequentialMLP]


def _bank(kind: type[nn.Module], config, groups) -> nn.Module:
    bank = kind(4, config, pg_collection=groups)
    init_weights(nn.ModuleDict({"experts": bank}), seed=3)
    with torch.no_grad():
        for p in bank.parameters():
            p.mul_(20.0).add_(0.01)  # biases start at zero
    return bank


def _run(bank: nn.Module, groups) -> dict[str, Tensor]:
    """Return output, summed over the ranks that share, and all gradients, made whole."""
    rng = torch.Generator().manual_seed(11)
    rows = torch.randn(sum(SIZES), H, generator=rng).double().requires_grad_()
    probs = torch.rand(sum(SIZES), generator=rng).double().requires_grad_()
    part, _ = bank(rows, torch.tensor(SIZES), probs)
    (part * torch.randn(part.shape, generator=rng).double()).sum().backward()
    found = {"output": part.detach().clone(), "rows": rows.grad, "probs": probs.grad}
    for tensor in found.values():
        dist.all_reduce(tensor, group=groups.expt_tp)
    for name, p in bank.named_parameters(prefix="experts"):
        found |= whole_tensors(name, p.grad, role_of(p), groups)
    return found


def _adds_up(kind: type[nn.Module], shape: dict) -> None:
    config = moe_config(**shape, fp64=True)
    alone, shared = make_groups(1), make_groups(1, etp=dist.get_world_size())
    want = _run(_bank(GroupedMLP, config, alone), alone)
    got = _run(_bank(kind, config, shared), shared)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_of_experts_add_up_to_the_whole_ones(kind, shape, world_size):
    run_ranks(_adds_up, world_size, kind, shape)


def _drawn_alike() -> None:
    config = moe_config(add_bias_linear=True)
    for kind in (GroupedMLP, SequentialMLP):
        wholes = {}
        for name, p in _bank(kind, config, make_groups(1)).named_parameters():
            wholes |= {s.name: s.tensor for s in logical_shards(name, p, role_of(p))}
        part = _bank(kind, config, make_groups(1, etp=2))
        count = 0
        for name, p in part.named_parameters():
            for shard in logical_shards(name, p, role_of(p)):
                assert torch.equal(shard.tensor, wholes[shard.name][shard.region]), shard.name
                count += 1
        assert count == 4 * (2 + 2 + 1 + 1)  # gate and up of weight and bias
        names = tensor_hashes(nn.ModuleDict({"experts": part}))
        assert len(names) == count
        rows = {0: "[0:12, 0:16]", 1: "[12:24, 0:16]"}[dist.get_rank()]
        assert f"experts.local_experts.3.linear_fc1.weight{rows}" in names
        assert sum(p.numel() for p in part.parameters()) < sum(w.numel() for w in wholes.values())


def test_initial_slices_are_those_of_the_whole_tensors():
    run_ranks(_drawn_alike, 2)


def _ddp(ep: int, etp: int) -> DistributedDataParallel:
    groups = make_groups(ep, etp=etp)
    model = nn.ModuleDict(
        {"experts": GroupedMLP(8 // ep, moe_config(**SHAPES[0], fp64=True), pg_collection=groups)}
    )
    init_weights(model, 5)
    return DistributedDataParallel(DistributedDataParallelConfig(), model, pg_collection=groups)


def _norm(ep: int, etp: int) -> None:
    every = []
    for ddp in (_ddp(ep, etp), _ddp(1, 1)):
        for number, (_, param) in enumerate(ddp.trainable_parameters()):
            # any function of the whole tensor's elements alone
            param.main_grad.copy_(param.detach() * 3 + 0.25 * (number + 1))
        gradients = [(buffer.layout.key, buffer.grad_data) for buffer in ddp.grad_buffers]
        owned = owned_gradients(gradients, ddp.pg_collection)
        every.append(global_grad_norm(owned, torch.device("cpu")))
    torch.testing.assert_close(*every, rtol=1e-12, atol=0.0)
    bits = [""] * dist.get_world_size()
    dist.all_gather_object(bits, every[0].item().hex())
    assert len(set(bits)) == 1


@pytest.mark.parametrize(("world_size", "ep", "etp"), [(2, 1, 2), (4, 2, 2), (4, 1, 2), (4, 1, 4)])
def test_the_norm_counts_each_slice_and_each_copy_once(world_size, ep, etp):
    run_ranks(_norm, world_size, ep, etp)


def _replicas() -> None:
    ddp = _ddp(1, 2)
    check_replicas(ddp)
    bank = ddp.module["experts"]
    with torch.no_grad():
        if dist.get_rank() == 1:
            bank.bias2[3, 5] += 1.0
    with pytest.raises(
        ReplicaError,
        match=r"in 1 tensor, .*: experts\.local_experts\.\d\.linear_fc2\.bias on rank 1",
    ):
        check_replicas(ddp)
    assert len({buffer.layout.key.split_over for buffer in ddp.grad_buffers}) == 2


def test_a_bias_that_all_ranks_hold_is_compared_over_those_that_share_the_expert():
    run_ranks(_replicas, 2)
