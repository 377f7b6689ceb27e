"""The same layout twice gives the same bits, with every axis on, for 20 steps."""

import pytest
import torch

from tests.helpers.layouts import LayoutResult, run_layout

EVERY_AXIS = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "sequence_parallel": True,
    "tensor_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "moe_token_dispatcher_type": "alltoall_dedup",
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 700,
    "optimizer": "adam",
    "clip_grad": 0.1,
    "lr": 1e-2,
    "fp64": False,
    "train_iters": 20,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.02, 0.05],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
LAYOUTS = {
    "tp cp ep dp": {"context_parallel_size": 2, "expert_model_parallel_size": 4},
    "tp ep dp pp": {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
        "expert_model_parallel_size": 2,
    },
    "tp cp ep pp": {
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "cp_comm_type": ["a2a"],
    },
    "tp ep etp dp": {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
}


def run(layout: str, steps: int, **options: object) -> LayoutResult:
    """Train over 8 ranks; in fp32, where another order of sums would show."""
    return run_layout(8, steps=steps, **(EVERY_AXIS | LAYOUTS[layout] | options))


def first_different_bit(got: LayoutResult, want: LayoutResult) -> str | None:
    """Name the first thing that is not the same to the bit."""
    for step, (mine, theirs) in enumerate(zip(got.steps, want.steps, strict=True)):
        if (mine.lm_loss, mine.grad_norm) != (theirs.lm_loss, theirs.grad_norm):
            return f"step {step}: loss or norm"
        for kind in ("gradients", "weights"):
            one, other = getattr(mine, kind), getattr(theirs, kind)
            assert one.keys() == other.keys()
            if differ := [name for name in one if not torch.equal(one[name], other[name])]:
                return f"step {step}: {kind} of {differ[0]}"
    return None if torch.equal(got.tokens_per_expert, want.tokens_per_expert) else "counts"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_twice_are_the_same_bits(layout):
    assert first_different_bit(run(layout, 20), run(layout, 20)) is None


@pytest.mark.slow
def test_another_seed_is_seen_in_the_first_step():
    layout = "tp cp ep dp"
    got = first_different_bit(run(layout, 1, seed=1), run(layout, 1, seed=2))
    assert got == "step 0: loss or norm"
