"""A model with every kind of parameter a checkpoint meets, and values that tell on themselves."""

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.dist_checkpointing.tensor_shards import Storable, TensorShards
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import GATED_PARTS, Init, ParamRole, Split, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_split import split_over

EXPERTS, HIDDEN, FFN = 4, 6, 4

# The first optimizer imports torch._dynamo (~200 modules): once here, not once in every rank.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
ZEROS = Init(kind="zeros")


class StandIn(nn.Module):
    """A dense weight, a bias and a stack of experts of which this rank holds some, or slices."""

    def __init__(
        self,
        experts: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        split: Split | None = None,
    ) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.zeros(5, HIDDEN, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(7, dtype=dtype))
        set_role(self.dense, ParamRole(init=ZEROS))
        set_role(self.bias, ParamRole(init=ZEROS, decays=False))
        self.experts = nn.Module()
        shape = (2 * FFN, HIDDEN) if split is None else split.local_shape((2 * FFN, HIDDEN))
        self.experts.weight1 = nn.Parameter(torch.zeros(len(experts), *shape, dtype=dtype))
        role = ParamRole(
            init=ZEROS,
            is_expert=True,
            expert_ids=experts,
            expert_name="linear_fc1.weight",
            split=split,
        )
        set_role(self.experts.weight1, role)
        self.register_buffer("counts", torch.zeros(EXPERTS, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def build(
    ep: int, dtype: torch.dtype = torch.float32, etp: int = 1, *, sharded: bool = False
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Build model and optimizer on this rank of the default group, at ``ep`` and ``etp``."""
    layout = ParallelLayout(world_size=dist.get_world_size(), ep=ep, etp=etp)
    groups = ProcessGroupCollection.create(layout)
    local = EXPERTS // ep
    first = groups.ep.rank() * local
    split = split_over("expt_tp", groups, dim=0, parts=(FFN, FFN), names=GATED_PARTS)
    model = StandIn(tuple(range(first, first + local)), dtype, split)
    config = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    ddp = DistributedDataParallel(config, model, pg_collection=groups)
    return ddp, get_megatron_optimizer(OptimizerConfig(lr=1e-3), ddp, pg_collection=groups)


def value_of(key: str, like: Storable) -> Tensor:
    """Return what the whole tensor of this key holds: another value for every key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def fill(tensors: dict[str, Storable]) -> None:
    """Write ``value_of`` into each tensor."""
    with torch.no_grad():
        for key, tensor in tensors.items():
            for block, value in _with_values(key, tensor):
                block.copy_(value)


def clear(tensors: dict[str, Storable]) -> None:
    """Write zeros into each tensor."""
    for key, tensor in tensors.items():
        for block, _ in _with_values(key, tensor):
            block.zero_()


def wrong_keys(tensors: dict[str, Storable]) -> list[str]:
    """List the keys whose tensors differ from ``value_of`` in any bit."""
    return [
        key
        for key, tensor in tensors.items()
        if not all(torch.equal(block, value) for block, value in _with_values(key, tensor))
    ]


def _with_values(key: str, tensor: Storable) -> Iterator[tuple[Tensor, Tensor]]:
    whole = value_of(key, tensor)
    if isinstance(tensor, TensorShards):
        yield from ((shard.tensor, whole[shard.region]) for shard in tensor.shards)
    else:
        yield tensor, whole
