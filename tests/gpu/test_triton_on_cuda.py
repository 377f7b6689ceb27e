"""Triton's kernels on a device give what torch gives there, and wait for nothing."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.extensions import triton_ops
from tests.helpers.triton_cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def _world_of_one():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_what_torch_gives(case):
    assert triton_ops.unusable() is None
    CASES[case]("cuda")


def test_kernels_launch_without_waiting():
    rows = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    index, probs = torch.arange(31, -1, -1, device="cuda"), torch.rand(32, device="cuda")

    def launch() -> None:
        triton_ops.gather_rows(rows, index, torch.float32)
        triton_ops.sum_rows(rows, index.view(2, 16), torch.bfloat16)
        triton_ops.swiglu_gradient(rows, probs, triton_ops.swiglu(rows, probs))

    launch()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
