"""A MoE layer whose shapes are known to the host, and a whole step but its end, never wait."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from megatron.training import train_step as step_module
from megatron.training.initialize import World
from megatron.training.run import TrainState
from megatron.training.setup_model import setup_run
from pretrain_gpt import forward_step, model_provider
from tests.helpers.layouts import make_config, microbatches
from tests.unit_tests.core.transformer.moe.layers import (
    H,
    make_groups,
    make_layer,
    make_reference,
    moe_config,
)

BF16 = {"bf16": True, "fp64": False, "hidden_size": 64, "ffn_hidden_size": 64}
STEPS = {
    "dense": BF16 | {"num_moe_experts": None, "moe_aux_loss_coeff": None},
    "dense, fp32": {"num_moe_experts": None, "moe_aux_loss_coeff": None, "fp64": False},
    "experts": BF16,
    "experts, shared": BF16 | {"moe_shared_expert_intermediate_size": 64},
    "experts, torch's kernels": BF16 | {"bias_swiglu_fusion": False, "moe_permute_fusion": False},
    "depths": BF16 | {"mtp_num_layers": 2},
    "latent attention": BF16
    | {
        "multi_latent_attention": True,
        "position_embedding_type": "rope",
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 16,
        "v_head_dim": 16,
    },
    "sharded optimizer": BF16 | {"use_distributed_optimizer": True},
    "sharded optimizer, overlap": BF16
    | {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "recompute": BF16
    | {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
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


@pytest.mark.parametrize("case", STEPS)
def test_a_step_waits_at_its_end_alone(case, monkeypatch):
    """From the first launch to the gradients of all microbatches, summed over ranks, it does not.

    Then the host reads the loss, and after the launch of the update the norm.
    """
    config = make_config(hidden_dropout=0.1, attention_dropout=0.0, **STEPS[case])
    groups = ProcessGroupCollection.create(config.model.layout(1))
    world = World(rank=0, world_size=1, device=torch.device("cuda", 0), pg_collection=groups)
    run = setup_run(config, world, model_provider, forward_step)
    step_module.train_step(run, TrainState(), microbatches(run, 0))  # libraries make ready
    forbidden = []

    def without_waiting(function):
        def called(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                forbidden.append(function.__name__)

        return called

    for name in ("count_tokens", "run_microbatches", "finalize_model_grads"):
        monkeypatch.setattr(step_module, name, without_waiting(getattr(step_module, name)))
    launch = run.optimizer._flat_step._launch
    monkeypatch.setattr(run.optimizer._flat_step, "_launch", without_waiting(launch))
    outcome = step_module.train_step(run, TrainState(), microbatches(run, 0))
    assert outcome.updated
    assert forbidden == ["count_tokens", "run_microbatches", "finalize_model_grads", "_launch"]
