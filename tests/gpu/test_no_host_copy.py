"""A MoE layer whose shapes are known to the host never waits for the device."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.forward_context import ForwardContext
from tests.unit_tests.core.transformer.moe.layers import (
    H,
    make_groups,
    make_layer,
    make_reference,
    moe_config,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PADDED = {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True}


@pytest.fixture(scope="module", autouse=True)
def _world_of_one():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, PADDED], ids=["topk", "padded"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "alltoall_hierarchical", "allgather"])
def test_forward_and_backward_make_no_device_to_host_copy(dispatcher, options):
    config = moe_config(bf16=True, moe_token_dispatcher_type=dispatcher, **options)
    plain = moe_config(moe_token_dispatcher_type=dispatcher, **options)
    layer = make_layer(config, make_groups(1), make_reference(plain)).cuda()
    tokens = torch.randn(64, 2, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    context = ForwardContext(same_num_tokens=True)
    layer(tokens, context)[0].sum().backward()  # libraries make themselves ready
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(tokens, context)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
