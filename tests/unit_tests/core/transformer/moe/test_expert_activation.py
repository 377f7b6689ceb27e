"""The weighted activation against plain autograd."""

import pytest
import torch
from torch import nn

from megatron.core.extensions.torch_native import grouped_mm
from megatron.core.transformer.moe.activated_product import activated_product
from megatron.core.transformer.moe.expert_activation import weighted_activation
from megatron.core.transformer.precision import compute_dtype


def _plain(inner: torch.Tensor, probs: torch.Tensor, gated: bool) -> torch.Tensor:
    if gated:
        gate, up = inner.chunk(2, dim=1)
        return nn.functional.silu(gate) * up * probs.unsqueeze(1)
    return nn.functional.gelu(inner) * probs.unsqueeze(1)


def _inputs(num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    inner = torch.randn(num_rows, width, generator=rng).double().requires_grad_()
    probs = torch.rand(num_rows, generator=rng).double().requires_grad_()
    return inner, probs, torch.randn(num_rows, width, generator=rng).double()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 100])
def test_values_and_gradients_equal_plain_autograd(gated, num_rows):
    inner, probs, weight = _inputs(num_rows, 8192)  # 100 rows are several blocks
    weight = weight[:, : 4096 if gated else 8192]
    got = weighted_activation(inner, probs, gated=gated)
    want = _plain(inner, probs, gated)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((got * weight).sum(), (inner, probs)),
        torch.autograd.grad((want * weight).sum(), (inner, probs)),
        rtol=1e-12,
        atol=1e-11,
    )


@pytest.mark.parametrize("gated", [True, False])
def test_bf16_is_computed_in_fp32_and_rounded_once(gated):
    inner, probs, _ = _inputs(6, 8)
    narrow = inner.detach().bfloat16()
    got = weighted_activation(narrow, probs.detach().float(), gated=gated)
    want = _plain(narrow.float(), probs.detach().float(), gated).bfloat16()
    assert torch.equal(got, want)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activation_and_product_in_one_give_the_bits_of_one_after_the_other(gated, dtype):
    rng = torch.Generator().manual_seed(3)
    sizes, ffn = torch.tensor([3, 0, 9, 4]), 8
    inner = torch.randn(16, ffn * (2 if gated else 1), generator=rng).to(dtype)
    probs = torch.rand(16, generator=rng).to(compute_dtype(dtype))
    weight = torch.randn(4, 24, ffn, generator=rng).to(dtype)
    results = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (inner, probs, weight)]
        if fused:
            out = activated_product(*leaves, sizes, gated=gated)
        else:
            out = grouped_mm(weighted_activation(*leaves[:2], gated=gated), leaves[2], sizes)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
