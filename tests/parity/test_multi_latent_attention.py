"""R1, R2: latent attention learns the same in every layout: each loss, gradient and weight.

Dropout is on, and batches have masks.
"""

import functools
from typing import Any

import pytest

from megatron.core.tensor_parallel import region_entry
from megatron.core.tensor_parallel.layers import replicated
from megatron.core.transformer import torch_norm
from tests.helpers.layouts import LayoutResult, run_layout
from tests.parity.test_context_parallel import DENSE as DENSE_OF_CP
from tests.parity.test_context_parallel import make_batch
from tests.parity.test_layouts import compare

SLOW = pytest.mark.slow
BASE = DENSE_OF_CP | {
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 2,
    "v_head_dim": 5,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_interleaved": True,
    "add_bias_linear": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "query latent": {"q_lora_rank": 10},
    "no query latent": {"add_qkv_bias": True, "add_proj_bias": True},
    "experts": {
        "q_lora_rank": 10,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": [0.02],
        "moe_layer_freq": [0, 1],
    },
    "tokens further ahead": {"q_lora_rank": 10, "mtp_num_layers": 1},
}
TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
SP = {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
ZERO3 = {"use_torch_fsdp2": True}
UP = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
CORE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


@functools.cache
def one_process(model: str) -> LayoutResult:
    """The run that all layouts of ``model`` are compared with."""
    return run_layout(1, batch_of=make_batch, **(BASE | MODELS[model]))


def check(model: str, world_size: int, **layout: Any) -> None:
    """Compare everything that a short run leaves behind."""
    got = run_layout(world_size, batch_of=make_batch, **(BASE | MODELS[model]), **layout)
    compare(got, one_process(model), weights=True)


QUICK = [
    ("query latent", 2, TP2),
    ("query latent", 4, TP4 | SP | UP),
    ("no query latent", 2, TP2 | SP),
    ("no query latent", 4, TP2 | CP2 | {"cp_comm_type": ["p2p"]}),
    ("experts", 4, TP2 | SP | EP2 | ZERO),
    ("query latent", 2, PP2),
    ("no query latent", 2, ZERO3),
    ("tokens further ahead", 2, TP2 | SP),
]


@pytest.mark.parametrize(("model", "world_size", "layout"), QUICK)
def test_layout_equals_one_process(model, world_size, layout):
    check(model, world_size, **layout)


WIDE = [
    (2, TP2),
    (2, TP2 | SP),
    (4, TP2 | SP | ZERO),
    (4, TP4),
    (4, TP4 | SP),
    (4, TP2 | PP2),
    (4, TP2 | SP | PP2 | CORE),
    (4, TP2 | SP | UP),
    *((2, CP2 | {"cp_comm_type": [kind]}) for kind in ("p2p", "all_gather", "a2a")),
    *((4, TP2 | SP | CP2 | {"cp_comm_type": [kind]}) for kind in ("p2p", "all_gather", "a2a")),
    (4, CP2 | PP2),
    (4, ZERO3 | CP2 | UP),
    (4, TP2 | {"overlap_grad_reduce": True, "bucket_size": 300}),
]


@SLOW
@pytest.mark.parametrize(("world_size", "layout"), WIDE)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_equals_one_process(model, world_size, layout):
    check(model, world_size, **layout)


@SLOW
@pytest.mark.parametrize("layout", [EP2, EP2 | TP2, EP2 | PP2, EP2 | CP2, EP2 | TP2 | SP | ZERO])
def test_every_layout_of_experts_equals_one_process(layout):
    check("experts", 4, **layout)


def test_bf16_follows_one_process():
    bf16 = {"fp64": False, "bf16": True, "optimizer": "adam", "lr": 1e-2}
    runs = [
        run_layout(
            ranks, steps=3, batch_of=make_batch, **(BASE | MODELS["query latent"] | bf16 | layout)
        )
        for ranks, layout in ((1, {}), (2, TP2 | SP | UP))
    ]
    for one, two in zip(*(run.steps for run in runs), strict=True):
        assert two.lm_loss == pytest.approx(one.lm_loss, rel=2**-7)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=2**-5)


def _one_rank_of_the_rotated_key(patch: pytest.MonkeyPatch) -> None:
    right = region_entry._Enter.backward

    def alone(ctx, grad):
        shared = ctx.entry.sequence_parallel
        right(ctx, grad)
        own = ctx.entry.group.rank()
        return (grad.chunk(ctx.entry.ranks)[own] if shared else grad), None

    patch.setattr(region_entry._Enter, "backward", alone)


def _own_tokens_only(patch: pytest.MonkeyPatch, module: Any) -> None:
    right = module.replace
    patch.setattr(
        module, "replace", lambda role, **new: right(role, **(new | {"sums_over_tp": False}))
    )


def _norms_of_own_tokens(patch: pytest.MonkeyPatch) -> None:
    right = torch_norm.ParamRole
    patch.setattr(torch_norm, "ParamRole", lambda **new: right(**(new | {"sums_over_tp": False})))


PLANTS = {
    "the rotated key learns from the heads of one rank": (_one_rank_of_the_rotated_key, {}),
    "so with shares of the sequence": (_one_rank_of_the_rotated_key, SP),
    "the way down learns from own tokens": (
        functools.partial(_own_tokens_only, module=replicated),
        SP,
    ),
    "norms learn from own tokens": (_norms_of_own_tokens, SP),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_sum_left_out_is_seen(plant, monkeypatch):
    one_process("query latent")
    change, layout = PLANTS[plant]
    change(monkeypatch)
    with pytest.raises(
        AssertionError, match=r"step \d: (lm_loss|grad_norm|gradient)|replicas|disagree|differ"
    ):
        check("query latent", 2, **TP2, **layout)
