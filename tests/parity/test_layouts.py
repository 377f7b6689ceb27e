"""Every split of data and expert parallelism equals one process: losses, gradients, weights.

R2, R3, R4, R8, R14: expert gradients, one global norm, live routers, empty experts, loss over the
global number of tokens. Dropout is on: its masks belong to samples, not to ranks.
"""

import functools

import pytest
import torch
from torch import Tensor

from tests.helpers.layouts import LayoutResult, run_layout

DATA_ONLY = pytest.mark.slow  # every day in test_verify_layouts.py, of one model
LAYOUTS = [  # (ranks, expert parallel)
    pytest.param(2, 1, marks=DATA_ONLY),
    (2, 2),
    pytest.param(4, 1, marks=DATA_ONLY),
    (4, 2),
    (4, 4),
]
SHARED = [(2, 1, 2), (4, 2, 2), (4, 1, 4), (4, 1, 2)]  # (ranks, expert parallel, expert tensor)
RTOL = 1e-12  # of the largest element of each tensor, in fp64

GPT_OSS = {
    "swiglu": False,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 0.05,  # the tiny model's gates are small
    "add_bias_linear": False,
    "add_mlp_bias": True,
    "moe_router_bias": True,
}
CASES = {
    "alltoall": {},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "alltoall_dedup": {"moe_token_dispatcher_type": "alltoall_dedup", "moe_router_topk": 4},
    "alltoall_hierarchical": {
        "moe_token_dispatcher_type": "alltoall_hierarchical",
        "moe_dispatcher_node_size": 2,
    },
    "sequential": {"moe_experts_type": "sequential"},
    "dense_first": {"moe_layer_freq": [0, 1], "untie_embeddings_and_output_weights": True},
    "shared_experts": {
        "moe_shared_expert_intermediate_size": 20,
        "moe_shared_expert_gate": True,
    },
    "latent": {"moe_latent_size": 10, "moe_shared_expert_intermediate_size": 20},
    "top1_rope": {
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
    },
    "chunks": {"moe_expert_chunk_tokens": 5, "overlap_grad_reduce": True, "bucket_size": 700},
    "shared_experts_overlapped": {
        "moe_shared_expert_intermediate_size": 20,
        "moe_shared_expert_overlap": True,
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
    },
    "capacity": {"moe_expert_capacity_factor": 0.75},
    "capacity_padded": {
        "moe_expert_capacity_factor": 0.5,
        "moe_token_drop_policy": "position",
        "moe_pad_expert_input_to_capacity": True,
    },
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
    "gpt_oss": GPT_OSS,
    "deepseek_v3": {
        "moe_router_score_function": "sigmoid",
        "moe_router_norm_topk_prob": False,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_group_score_topk": 2,
        "moe_router_topk": 3,
        "moe_router_topk_scaling_factor": 1.5,
    },
    "expert_bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_router_load_balancing_type": ["none"],
        "moe_aux_loss_coeff": None,
    },
    "jitter": {"moe_input_jitter_eps": 0.2, "hidden_dropout": 0.0},
    "balance_in_sequences": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.02, 0.05],
    },
    "expert_choice": {
        "moe_router_type": "expert_choice",
        "moe_aux_loss_coeff": None,
        "moe_expert_capacity_factor": 1.5,
    },
    "hash": {"moe_router_type": "hash", "moe_aux_loss_coeff": None},
    "experts_by_layer": {
        "moe_num_experts_per_layer": [4, 8],
        "moe_router_bias": True,
        "moe_router_topk_per_layer": [1, 3],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
    },
    "forced": {"moe_router_force_load_balancing": True},
    "forced_skew": {"moe_router_force_biased": 1.5},
    "sinkhorn": {
        "moe_router_load_balancing_type": ["sinkhorn"],
        "moe_aux_loss_coeff": None,
    },
    "quantile_balancing": {
        "moe_router_load_balancing_type": ["quantile_balancing"],
        "moe_aux_loss_coeff": None,
        "moe_router_quantile_balancing_ema": 0.25,
    },
    "overlap": {"overlap_grad_reduce": True, "bucket_size": 700},
    "adam_clipped": {"clip_grad": 0.1, "optimizer": "adam", "lr": 1e-3},
}


CASES_OF_SHARED = [
    "alltoall",
    "allgather",
    "alltoall_dedup",
    "alltoall_hierarchical",
    "sequential",
    "gpt_oss",
    "latent",
    "capacity_padded",
    "expert_bias",
    "overlap",
    "adam_clipped",
]


@functools.cache
def one_process(case: str) -> LayoutResult:
    """The run that all layouts of ``case`` are compared with."""
    return run_layout(1, **_options(case))


def _options(case: str) -> dict:
    return {"optimizer": "sgd"} | CASES[case]


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    """Compare in the order of the model, so that the first difference is the first one named."""
    assert sorted(got) == sorted(want)
    for key, expected in want.items():
        error = (got[key] - expected).abs().max().item()
        bound = RTOL * expected.abs().max().item()
        ratio = (got[key].norm() / expected.norm()).item()
        assert error <= bound, f"{what} of {key}: {error=:.3g} {bound=:.3g} {ratio=:.6g}"


@pytest.mark.parametrize(("world_size", "ep"), LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_layout_equals_one_process(case, world_size, ep):
    check_layout(case, world_size, expert_model_parallel_size=ep)


@pytest.mark.parametrize(("world_size", "ep", "etp"), SHARED)
@pytest.mark.parametrize("case", CASES_OF_SHARED)
def test_layout_of_shared_experts_equals_one_process(case, world_size, ep, etp):
    check_layout(case, world_size, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)


def check_layout(case: str, world_size: int, **layout: int) -> None:
    """Compare a layout of ``case`` with one process."""
    got = run_layout(world_size, **layout, **_options(case))
    # Adam divides by the root of tiny second moments: rounding of a gradient is magnified.
    compare(got, one_process(case), weights=_options(case)["optimizer"] == "sgd")


def compare(got: LayoutResult, want: LayoutResult, *, weights: bool) -> None:
    """Compare initial weights, losses, norms, gradients, weights and counts of all steps."""
    for key, tensor in want.initial.items():
        assert torch.equal(got.initial[key], tensor), f"initial weight of {key}"
    for step, (mine, theirs) in enumerate(zip(got.steps, want.steps, strict=True)):
        for what in ("lm_loss", "grad_norm"):
            found, wanted = getattr(mine, what), getattr(theirs, what)
            assert found == pytest.approx(wanted, rel=RTOL), f"step {step}: {what} {found} {wanted}"
        assert_equal(mine.gradients, theirs.gradients, f"step {step}: gradient")
        if weights:
            assert_equal(mine.weights, theirs.weights, f"step {step}: weight")
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)


def test_every_router_and_expert_learns():
    result = one_process("alltoall")
    for step in result.steps:
        for key, gradient in step.gradients.items():
            used = gradient.abs().max() > 0
            assert used or ".local_experts." in key, f"{key} has no gradient"
    counts = result.tokens_per_expert
    assert counts.sum(dim=1).tolist() == [2 * 8 * 12 * 2] * 2  # steps x samples x tokens x top-k


def test_no_two_experts_start_equal():
    initial = one_process("alltoall").initial
    experts = [v for k, v in initial.items() if k.endswith("linear_fc1.weight")]
    assert len(experts) == 16
    assert all(not torch.equal(a, b) for i, a in enumerate(experts) for b in experts[:i])


@pytest.mark.parametrize("planted", [0.5, 1.0 + 1e-9])
def test_a_wrong_scale_of_one_gradient_is_caught(planted):
    gradients = one_process("alltoall").steps[0].gradients
    key = next(k for k in gradients if ".local_experts." in k and gradients[k].abs().max() > 0)
    with pytest.raises(AssertionError, match="local_experts"):
        assert_equal(gradients | {key: gradients[key] * planted}, gradients, "gradient")
