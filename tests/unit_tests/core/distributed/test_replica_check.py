import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.replica_check import ReplicaError, check_replicas
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.distributed.stand_in import StandIn, start


@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_replicas_pass(ranks, ep, dtype):
    run_ranks(_equal, ranks, ep, dtype)


def _equal(ep, dtype):
    check_replicas(start(ep, dtype).ddp)


@pytest.mark.parametrize("parameter", ["norm", "experts.weight2"])
def test_one_different_bit_on_one_rank_is_an_error_on_all_ranks(parameter):
    run_ranks(_different, 4, parameter)


def _different(parameter):
    run = start(2)
    if dist.get_rank() == 3:
        flat = run.model.get_parameter(parameter).data.view(-1)
        flat.view(torch.int64)[3] += 1
    with pytest.raises(ReplicaError, match=rf"1 of 6 parameters differ .*: {parameter}\."):
        check_replicas(run.ddp)


def test_models_of_different_shape_are_an_error_on_all_ranks():
    run_ranks(_other_shape, 2)


def _other_shape():
    run = start(1)
    model = StandIn(tuple(range(1 + dist.get_rank())), torch.float64)
    ddp = DistributedDataParallel(DistributedDataParallelConfig(), model, pg_collection=run.pg)
    with pytest.raises(ReplicaError, match="ranks 0 and 1 have models of different shapes"):
        check_replicas(ddp)
