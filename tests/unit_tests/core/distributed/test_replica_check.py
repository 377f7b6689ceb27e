import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.replica_check import ReplicaError, check_replicas, tensor_hash
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.distributed.stand_in import StandIn, start


@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_replicas_pass(ranks, ep, dtype):
    run_ranks(_equal, ranks, ep, dtype)


def _equal(ep, dtype):
    run = start(ep, dtype)
    run.model.register_buffer("bias", torch.ones(3))
    run.model.register_buffer("scratch", torch.full((3,), float(dist.get_rank())), persistent=False)
    check_replicas(run.ddp)
    check_replicas(run.ddp, iteration=5)


@pytest.mark.parametrize(
    ("parameter", "iteration", "message"),
    [
        ("norm", None, r"before the first step in 1 tensor, .*: norm on rank 3\. All ranks must"),
        ("norm", 7, r"after iteration 7 in 1 tensor, .*: norm on rank 3\. This step is not saved"),
        ("bias", 7, r"after iteration 7 in 1 tensor, .*: bias on rank 3\."),
        ("experts.weight2", 7, r": experts\.local_experts\.2\.fc2\.weight on rank 3\."),
    ],
)
def test_one_different_bit_on_one_rank_is_an_error_on_all_ranks(parameter, iteration, message):
    run_ranks(_different, 4, parameter, iteration, message)


def _different(parameter, iteration, message):
    run = start(2)
    run.model.register_buffer("bias", torch.ones(6))
    if dist.get_rank() == 3:
        flat = run.model.state_dict()[parameter].view(-1)
        flat.view(torch.int32)[3] += 1
    with pytest.raises(ReplicaError, match=message):
        check_replicas(run.ddp, iteration=iteration)


def test_several_tensors_and_ranks_are_named_in_the_order_of_the_model():
    run_ranks(_several, 4)


def _several():
    run = start(2)
    rank = dist.get_rank()
    with torch.no_grad():
        run.model.norm[2] += rank % 3  # ranks 1 and 2 differ from rank 0
        run.model.experts.bias1[0, 0] += float(rank == 2)  # expert 0, copies on ranks 0 and 2
    with pytest.raises(ReplicaError) as told:
        check_replicas(run.ddp, iteration=1)
    assert (
        "in 2 tensors, from the first rank that holds a copy: norm on ranks 1, 2; "
        "experts.local_experts.0.fc1.bias on rank 2."
    ) in str(told.value)


def test_models_of_different_shape_are_an_error_on_all_ranks():
    run_ranks(_other_shape, 2)


def _other_shape():
    run = start(1)
    model = StandIn(tuple(range(1 + dist.get_rank())), torch.float64)
    ddp = DistributedDataParallel(DistributedDataParallelConfig(), model, pg_collection=run.pg)
    with pytest.raises(ReplicaError, match="ranks 0 and 1 have models of different shapes"):
        check_replicas(ddp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_the_hash_sees_every_element_swaps_signs_and_nan(dtype):
    base = (torch.arange(50) % 7).to(dtype)
    seen = {int(tensor_hash(base))}
    assert int(tensor_hash(base.clone())) in seen
    for place in range(50):
        other = base.clone()
        other[place] = 1 - other[place] if dtype != torch.bool else ~other[place]
        if torch.equal(other, base):
            continue
        number = int(tensor_hash(other))
        assert number not in seen
        seen.add(number)
    swapped = base[torch.tensor([1, 0, *range(2, 50)])]
    assert int(tensor_hash(swapped)) != int(tensor_hash(base))
    if dtype != torch.bool:
        assert int(tensor_hash(base * -1)) != int(tensor_hash(base)), "-0.0 is not 0.0"
        opposite = torch.tensor([1.5, -1.5], dtype=dtype)
        assert int(tensor_hash(opposite)) != int(tensor_hash(-opposite))
        nan = torch.full((3,), float("nan"), dtype=dtype)
        assert int(tensor_hash(nan)) == int(tensor_hash(nan.clone()))


def test_the_hash_of_a_large_tensor_does_not_depend_on_its_pieces(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = int(tensor_hash(tensor))
    monkeypatch.setattr("megatron.core.distributed.replica_check._CHUNK", 64)
    assert int(tensor_hash(tensor)) == whole
