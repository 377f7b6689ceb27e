"""Recomputing in backward changes no bit of a training run, and keeps less.

R5, R19: metrics are counted once, and routing is the same the second time. Dropout, jitter,
capacity, a balance loss over all ranks and overlapped reduction are on.
"""

import functools
from itertools import product
from typing import Any

import pytest
import torch

from tests.helpers.layouts import LayoutResult, run_layout
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt

BASE: dict[str, Any] = {
    "num_layers": 3,
    "moe_layer_freq": [1, 0, 1],
    "moe_shared_expert_intermediate_size": 20,
    "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.02, 0.05],
    "moe_expert_capacity_factor": 0.75,
    "moe_input_jitter_eps": 0.2,
    "overlap_grad_reduce": True,
    "bucket_size": 700,
    "optimizer": "adam",
    "fp64": False,
}
FULL = {"recompute_granularity": "full"}
CASES: dict[str, dict[str, Any]] = {
    "uniform": FULL | {"recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform_of_two": FULL | {"recompute_method": "uniform", "recompute_num_layers": 2},
    "block": FULL | {"recompute_method": "block", "recompute_num_layers": 1},
    "core_attn": {"recompute_granularity": "selective"},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe", "moe_act"]},
    "mlps": {
        "recompute_granularity": "selective",
        "recompute_modules": ["mlp", "shared_experts", "core_attn"],
    },
}


LAYOUTS = [*product(CASES, [1, 2]), ("uniform", 4), ("moe", 4)]


@functools.cache
def _kept(world_size: int) -> LayoutResult:
    return _run(world_size)


def _run(world_size: int, **options: Any) -> LayoutResult:
    ep = min(world_size, 2)
    return run_layout(world_size, expert_model_parallel_size=ep, **BASE, **options)


@pytest.mark.parametrize(("case", "world_size"), LAYOUTS)
def test_recomputation_changes_no_bit_of_a_run(case, world_size):
    want = _kept(world_size)
    got = _run(world_size, **CASES[case])
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert mine.lm_loss == theirs.lm_loss
        assert mine.grad_norm == theirs.grad_norm
        for key, gradient in theirs.gradients.items():
            assert torch.equal(mine.gradients[key], gradient), f"gradient of {key}"
        for key, weight in theirs.weights.items():
            assert torch.equal(mine.weights[key], weight), f"weight of {key}"


def _kept_bytes(**options: Any) -> int:
    """What a model of four MoE layers keeps between forward and backward."""
    config = tiny_config(
        num_layers=4,
        num_moe_experts=8,
        moe_router_topk=4,
        fp64=False,
        moe_shared_expert_intermediate_size=128,
        **options,
    )
    model = tiny_gpt(config)
    ids, positions, labels = tiny_batch(samples=8, length=24)
    with LiveBytes() as memory:
        loss = model(ids, positions, labels=labels).sum()
        kept = memory.now
        loss.backward()
    return kept


def test_recomputation_keeps_less_the_more_is_recomputed():
    full = FULL | {"recompute_method": "uniform", "recompute_num_layers": 1}
    plain = _kept_bytes()
    core, shared, moe, one, all_layers, together = (
        _kept_bytes(**options)
        for options in (
            CASES["core_attn"],
            {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]},
            CASES["moe"],
            CASES["block"],
            full,
            full | {"recompute_num_layers": 4},
        )
    )
    assert max(core, shared) < plain
    assert moe < 0.4 * plain
    assert 0.7 * plain < one < 0.8 * plain  # a layer of four is not kept
    assert together < all_layers < 0.15 * plain
