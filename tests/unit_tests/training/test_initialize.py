from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from megatron.training.config.distributed import DistributedConfig
from megatron.training.initialize import (
    Launch,
    choose_backend,
    choose_device,
    connect,
    initialize,
    set_threads,
    shut_down,
)

ALONE, SECOND_OF_TWO = Launch(0, 1, 0, 1), Launch(1, 2, 1, 2)
CPU = torch.device("cpu")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_without_torchrun_the_world_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == ALONE


def test_cpu_is_chosen_with_its_reason(no_cuda: None) -> None:
    assert choose_device(DistributedConfig(), ALONE) == (CPU, "no CUDA device found")


def test_cuda_is_preferred_where_there_is_some(one_gpu: None) -> None:
    device, why = choose_device(DistributedConfig(), ALONE)
    assert device == torch.device("cuda", 0)
    assert why == "found: Some GPU"
    assert choose_backend(DistributedConfig(), device) == "nccl"


def test_cuda_that_is_not_there_is_refused(no_cuda: None) -> None:
    with pytest.raises(ConfigError, match="found 0; start fewer ranks"):
        choose_device(DistributedConfig(device="cuda"), ALONE)


def test_more_ranks_than_devices_are_refused(one_gpu: None) -> None:
    with pytest.raises(ConfigError, match="2 ranks on this machine need as many CUDA devices"):
        choose_device(DistributedConfig(), SECOND_OF_TWO)


def test_nccl_on_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs CUDA devices"):
        choose_backend(DistributedConfig(distributed_backend="nccl"), CPU)
    assert choose_backend(DistributedConfig(), CPU) == "gloo"


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("megatron.training.initialize.os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    set_threads(Launch(0, 2, 0, 2), CPU)
    assert asked == [4]
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    assert "4 would use all 8 cores" in set_threads(Launch(0, 2, 0, 2), CPU)
    assert asked == [4]


def test_several_ranks_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR and MASTER_PORT .* torchrun"):
        connect(SECOND_OF_TWO, "gloo", CPU, timedelta(seconds=1))


def test_a_world_of_one_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    config = parse_args(["--mock-data", "--num-layers=1", "--hidden-size=32", "--device=cpu"])
    world = initialize(config)
    try:
        total = torch.ones(2)
        dist.all_reduce(total, group=world.pg_collection.dp_cp)
        assert total.tolist() == [1.0, 1.0]
        assert world.place() == "rank 0 (dp 0, ep 0)"
        assert parallel_state.get_data_parallel_world_size() == 1
    finally:
        shut_down()
    assert not dist.is_initialized()
