"""Which kernels a layer is built with follows from flags, activation and what is installed."""

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.extensions import triton_ops
from megatron.core.transformer.moe import expert_activation, permutation
from megatron.core.transformer.moe.fused_on_cuda import (
    FUSED_ROWS,
    FUSED_SWIGLU,
    cuda_activation,
    row_mover,
    standing,
)
from megatron.training.fused_kernels import announced, check_asked
from tests.unit_tests.core.transformer.moe.layers import moe_config
from tests.unit_tests.training.test_resume_rules import run_config


@pytest.fixture
def usable(monkeypatch):
    """As on a machine with a GPU and triton."""
    monkeypatch.setattr(triton_ops, "unusable", lambda: None)


@pytest.mark.usefixtures("usable")
def test_each_flag_turns_its_kernel_off():
    assert row_mover(moe_config()) is FUSED_ROWS
    assert cuda_activation(moe_config()) is FUSED_SWIGLU
    assert row_mover(moe_config(moe_permute_fusion=False)) is permutation.IN_TORCH
    assert cuda_activation(moe_config(bias_swiglu_fusion=False)) is expert_activation.IN_TORCH
    clamped = moe_config(activation_func_clamp_value=7.0)
    assert cuda_activation(clamped) is expert_activation.IN_TORCH
    assert [row.chosen for row in standing(moe_config(moe_permute_fusion=False))] == [
        "torch",
        "triton",
    ]


def test_without_a_gpu_torch_computes_and_the_banner_says_why(monkeypatch):
    monkeypatch.setattr(triton_ops, "unusable", lambda: "needs a CUDA device")
    assert row_mover(moe_config()) is permutation.IN_TORCH
    assert cuda_activation(moe_config()) is expert_activation.IN_TORCH
    rows = announced(run_config(num_moe_experts=4, swiglu=True))
    assert {row.why for row in rows} == {"needs a CUDA device"}
    assert announced(run_config()) == []


@pytest.mark.usefixtures("usable")
def test_tensors_of_a_cpu_and_fp64_are_left_to_torch():
    rows, index = torch.randn(4, 6, dtype=torch.float64), torch.tensor([2, 0])
    assert not triton_ops.takes(rows)
    assert not triton_ops.takes(rows.float())
    assert torch.equal(FUSED_ROWS.gather(rows, index, rows.dtype), rows[index])
    slots = torch.tensor([[0, 1, 2], [3, 4, 4]])
    want = torch.stack((rows[0] + rows[3], rows[1], rows[2]))
    assert torch.equal(FUSED_ROWS.add_up(rows, slots, rows.dtype), want)
    inner, probs, kind = rows, torch.rand(4, dtype=torch.float64), moe_config().activation_kind
    plain = expert_activation.IN_TORCH
    assert torch.equal(
        FUSED_SWIGLU.activate(inner, probs, kind=kind), plain.activate(inner, probs, kind=kind)
    )
    grad = torch.randn(4, 3, dtype=torch.float64)
    for one, other in zip(
        FUSED_SWIGLU.differentiate(inner, probs, grad, kind=kind),
        plain.differentiate(inner, probs, grad, kind=kind),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_what_is_asked_for_by_name_must_be_possible():
    config = run_config(num_moe_experts=4, swiglu=True)
    check_asked(config, torch.device("cpu"))
    config.sources["moe_permute_fusion"] = "cli"
    check_asked(config, torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="--moe-permute-fusion is for CUDA and this"):
        check_asked(config, torch.device("cpu"))
    config.model.moe_permute_fusion = False
    check_asked(config, torch.device("cpu"))
