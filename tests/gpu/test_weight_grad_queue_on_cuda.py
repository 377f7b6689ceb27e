"""I and W on a CUDA device, where autograd works in a thread of its own: the bits of B."""

from typing import Any

import pytest
import torch

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt, world_of_one
from tests.helpers.two_steps import ORDERS, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False},
}


@pytest.mark.parametrize("dtype", [{}, {"fp64": False, "bf16": True}])
@pytest.mark.parametrize("case", CASES)
def test_two_steps_give_the_bits_of_one(case, dtype):
    config = tiny_config(hidden_dropout=0.1, **CASES[case], **dtype)
    model = DistributedDataParallel(
        DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=2000),
        tiny_gpt(config, spread=4.0).cuda(),
        pg_collection=world_of_one(),
    )
    batches = []
    for seed in range(3):
        ids, positions, labels = (x.cuda() for x in tiny_batch(samples=2, length=16, seed=seed))
        batches.append((ids, positions, labels))
    want = gradients(model, batches, ORDERS["whole"])
    got = gradients(model, batches, ORDERS["last_before_others"])
    for key, gradient in want.items():
        assert gradient.any(), key
        assert torch.equal(got[key], gradient), key
