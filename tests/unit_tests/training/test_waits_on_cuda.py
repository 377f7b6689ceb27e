"""Where the host waits for a GPU in a training step: twice, at its end. Shown without a GPU."""

from typing import Any

import pytest
import torch

from tests.helpers.pretended_device import CUDA, pretended_device
from tests.helpers.pretended_step import run_steps

ONCE = [("train_step.py", "agree"), ("flat_step.py", "step")]
"""The loss, which decides whether the step is made, and the norm, which is told."""
DENSE: dict[str, Any] = {"num_moe_experts": None, "moe_aux_loss_coeff": None}
BF16: dict[str, Any] = {"fp64": False, "bf16": True, "hidden_size": 32, "ffn_hidden_size": 32}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "position_embedding_type": "rope",
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}
CAPACITY: dict[str, Any] = {"moe_expert_capacity_factor": 0.75}
CASES: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "dense, RMSNorm, rope": DENSE | {"normalization": "RMSNorm", "position_embedding_type": "rope"},
    "experts": {},
    "experts, sigmoid, bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "experts, biases": {"add_bias_linear": True},
    "shared experts": {"moe_shared_expert_intermediate_size": 24},
    "padded capacity": CAPACITY | {"moe_pad_expert_input_to_capacity": True},
    "hierarchical": {"moe_token_dispatcher_type": "alltoall_hierarchical"},
    "dedup": {"moe_token_dispatcher_type": "alltoall_dedup"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "depths": {"mtp_num_layers": 2},
    "latent attention": MLA,
    "recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "bf16, sharded": BF16 | {"use_distributed_optimizer": True},
    "bf16, clipped": BF16 | {"clip_grad": 1.0},
    "sgd": {"optimizer": "sgd"},
}
QUICK = ("dense, RMSNorm, rope", "experts", "bf16, sharded")
LOOPED = {"grouped_product", "grouped_weight_grad"}
"""Functions that ask for the rows of each expert where ``F.grouped_mm`` takes no fp64."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES]
)
def test_a_step_waits_at_its_end_alone_and_gives_what_a_cpu_gives(case):
    options = CASES[case]
    steps, cpu = run_steps(on_cuda=True, **options), run_steps(on_cuda=False, **options)
    expected = ONCE + [("mtp_losses.py", "means")] * ("mtp_num_layers" in options)
    assert [place for place in steps.waits if place[1] not in LOOPED] == expected
    assert ("bf16" in options) <= (steps.waits == ONCE), "bf16 products need no sizes"
    close = 2e-2 if "bf16" in options else 1e-10
    for ours, theirs in zip(steps.outcomes, cpu.outcomes, strict=True):
        assert ours.lm_loss == pytest.approx(theirs.lm_loss, rel=close)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=close)


def test_tokens_dropped_without_padding_must_be_counted():
    waits = run_steps(on_cuda=True, **CAPACITY).waits
    assert ("permutation.py", "plan_rows") in waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x[[0, 2]],
        lambda x: (x > 0).nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_noted(wait, monkeypatch):
    monkeypatch.setattr("tests.helpers.pretended_device._ROOT", __file__)
    with pretended_device() as waits:
        x = torch.arange(4.0, device=CUDA)
        assert waits == []
        wait(x)
        assert waits == [("test_waits_on_cuda.py", "<lambda>")]


def test_what_does_not_wait_is_not_noted_and_stays_on_the_device(monkeypatch):
    monkeypatch.setattr("tests.helpers.pretended_device._ROOT", __file__)
    with pretended_device() as waits:
        x = torch.arange(4.0, device=CUDA)
        made = [
            torch.ones(4).to(CUDA, non_blocking=True) + x,
            x[1:],
            x.index_select(0, torch.arange(2, device=x.device)),
            torch.zeros_like(x),
            x.new_zeros(3),
            x.double(),
            torch.nonzero_static(x > 0, size=3),
        ]
        assert all(one.is_cuda and one.device == CUDA for one in made)
        assert not torch.ones(2).is_cuda
        with pytest.raises(AssertionError, match="of the host and of the device"):
            x + torch.ones(4)
    assert waits == []
