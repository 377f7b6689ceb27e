"""MLPs and experts as GPT-OSS has them equal one process in every layout: all steps, to 1e-12.

Clamped quick GEGLU with an offset, biases of every MLP and none elsewhere, a bias in the router; a
dense layer first, of another width than the experts, and gated shared experts with biases.
"""

import functools
from typing import Any

import pytest

from tests.helpers.layouts import LayoutResult, run_layout
from tests.parity.test_layouts import GPT_OSS, compare
from tests.reference.activations import OPTIONS

SLOW = pytest.mark.slow
BASE: dict[str, Any] = {
    "optimizer": "sgd",
    "num_attention_heads": 4,
    "moe_layer_freq": [0, 1],
    "ffn_hidden_size": 28,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 12,
    "moe_shared_expert_gate": True,
}
PLAIN = {"swiglu": False, "add_bias_linear": False, "add_mlp_bias": True, "moe_router_bias": True}
MODELS = {"gpt_oss": GPT_OSS} | {
    name: PLAIN | options for name, options in OPTIONS.items() if name != "gpt_oss"
}
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
EP = {"expert_model_parallel_size": 2}
ETP = {"expert_tensor_parallel_size": 2}
ONE_SLICE = {"expert_tensor_parallel_size": 1}
PP = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "bucket_size": 700}


def name_of(value: object) -> str:
    """Write a layout as a test's name."""
    if not isinstance(value, dict):
        return str(value)
    return "-".join(f"{key}={item}" for key, item in value.items())


# ranks, layout
QUICK = [(2, SP | EP | ONE_SLICE), (2, PP)]
WIDE: list[tuple[int, dict[str, Any]]] = [
    (2, EP),
    (2, ETP),
    (2, TP),
    (2, SP | EP | ONE_SLICE | {"moe_token_dispatcher_type": "allgather"}),
    (2, EP | {"moe_experts_type": "sequential"}),
    (2, ETP | {"moe_experts_type": "sequential"}),
    (2, EP | {"moe_grouped_mm_backend": "torch_native"}),
    (2, ETP | {"moe_grouped_mm_backend": "torch_native"}),
    (2, EP | {"moe_expert_chunk_tokens": 5}),
    (2, EP | {"recompute_granularity": "selective", "recompute_modules": ["moe", "mlp"]}),
    (2, {"context_parallel_size": 2}),
    (4, EP | ETP),
    (4, TP | EP | ETP),
    (4, TP | PP),
    (4, EP | PP | SHARDED),
    (2, PP | {"pipeline_schedule": "zb-h1"}),
    (4, EP | PP | {"pipeline_schedule": "zb-h2", "overlap_grad_reduce": True}),
    (4, SP | EP | SHARDED),
]


@functools.cache
def one_process(model: str) -> LayoutResult:
    """The run that all layouts of ``model`` are compared with."""
    return run_layout(1, **(BASE | MODELS[model]))


def check(model: str, ranks: int, layout: dict[str, Any]) -> None:
    """Compare losses, gradients, weights and counts of a layout with those of one process."""
    compare(run_layout(ranks, **(BASE | MODELS[model] | layout)), one_process(model), weights=True)


@pytest.mark.parametrize(("ranks", "layout"), QUICK, ids=name_of)
def test_a_layout_of_a_gpt_oss_like_model_equals_one_process(ranks, layout):
    check("gpt_oss", ranks, layout)


@SLOW
@pytest.mark.parametrize(("ranks", "layout"), WIDE, ids=name_of)
def test_every_layout_of_a_gpt_oss_like_model_equals_one_process(ranks, layout):
    check("gpt_oss", ranks, layout)


@SLOW
@pytest.mark.parametrize("model", MODELS)
def test_every_activation_equals_one_process_on_slices(model):
    check(model, 4, TP | EP | ETP)


def test_every_bias_learns():
    for step in one_process("gpt_oss").steps:
        biases = {key for key in step.gradients if key.endswith(".bias") and ".mlp." in key}
        assert {key.split(".mlp.")[1].split(".")[0] for key in biases} == {
            "linear_fc1",
            "linear_fc2",
            "router",
            "experts",
            "shared_experts",
        }
        for key in biases:
            assert ".local_experts." in key or step.gradients[key].abs().max() > 0, key
