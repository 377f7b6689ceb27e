"""What a rank steps, and what it keeps for that."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.core.distributed.bucket_layout import ParamSpec, plan_buckets
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.shard_layout import overlaps, owned_slices
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import Init, ParamRole, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from tests.helpers.ranks import run_ranks

ROWS, COLUMNS, MATRICES = 128, 128, 3


def test_every_element_of_a_parameter_is_stepped_by_one_rank():
    specs = [ParamSpec(numel=n, is_expert=n % 2 == 1) for n in (3000, 7, 5001, 1024, 9)]
    sizes = [3, 2]
    layout = plan_buckets(specs, 2000, lambda key: sizes[key.is_expert])
    kinds = [sizes[buffer.key.is_expert] for buffer in layout.buffers]
    seen = [0] * len(specs)
    for number, buffer in enumerate(layout.buffers):
        for rank in range(kinds[number]):
            pieces = owned_slices(layout.buckets, [rank] * len(kinds), kinds)
            for piece in (piece for piece in pieces if piece.buffer == number):
                for overlap in overlaps(piece, buffer):
                    seen[overlap.span.param] += overlap.end - overlap.start
    assert seen == [spec.numel for spec in specs]


def _model() -> nn.Module:
    model = nn.Module()
    for number in range(MATRICES):
        weight = nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16))
        model.register_parameter(f"weight{number}", set_role(weight, ParamRole(init=Init())))
    return model


def _kept_bytes(sharded: bool) -> None:
    groups = ProcessGroupCollection.create(ParallelLayout(world_size=dist.get_world_size()))
    config = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    ddp = DistributedDataParallel(config, _model(), pg_collection=groups)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3), ddp, pg_collection=groups)
    storages = {}
    for group in optimizer.param_groups:
        for main in group["params"]:
            moments = optimizer._flat_step.moments(main).values()
            for tensor in (main, *moments):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    ranks = dist.get_world_size() if sharded else 1
    assert sum(storages.values()) == 3 * 4 * math.prod((MATRICES, ROWS, COLUMNS)) // ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_main_weights_and_moments_take_a_share_of_the_bytes(ranks):
    run_ranks(_kept_bytes, ranks, True)
    run_ranks(_kept_bytes, ranks, False)
