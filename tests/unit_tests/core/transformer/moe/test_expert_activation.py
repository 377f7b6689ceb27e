"""The weighted activation against plain autograd."""

import pytest
import torch

from megatron.core.extensions.torch_native import grouped_mm
from megatron.core.transformer.activations import activation_of
from megatron.core.transformer.config.activation import ActivationConfig, ActivationKind
from megatron.core.transformer.moe.activated_product import activated_product
from megatron.core.transformer.moe.expert_activation import weighted_activation
from megatron.core.transformer.precision import compute_dtype
from tests.reference.activations import ACTIVATIONS, OPTIONS


def _kind(name: str) -> ActivationKind:
    return ActivationConfig(**OPTIONS[name]).activation_kind


def _plain(inner: torch.Tensor, probs: torch.Tensor, name: str) -> torch.Tensor:
    return ACTIVATIONS[name](inner) * probs.unsqueeze(1)


def _inputs(num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    inner = torch.randn(num_rows, width, generator=rng).double().requires_grad_()
    probs = torch.rand(num_rows, generator=rng).double().requires_grad_()
    return inner, probs, torch.randn(num_rows, width, generator=rng).double()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("num_rows", [0, 1, 100])
def test_values_and_gradients_equal_plain_autograd(name, num_rows):
    inner, probs, weight = _inputs(num_rows, 8192)  # 100 rows are several blocks
    weight = weight[:, : 4096 if _kind(name).gated else 8192]
    got = weighted_activation(inner, probs, kind=_kind(name))
    want = _plain(inner, probs, name)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((got * weight).sum(), (inner, probs)),
        torch.autograd.grad((want * weight).sum(), (inner, probs)),
        rtol=1e-12,
        atol=1e-11,
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bf16_is_computed_in_fp32_and_rounded_once(name):
    inner, probs, _ = _inputs(6, 8)
    narrow = inner.detach().bfloat16()
    got = weighted_activation(narrow, probs.detach().float(), kind=_kind(name))
    active = activation_of(_kind(name))(narrow.float())
    want = (active * probs.detach().float().unsqueeze(1)).bfloat16()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activation_and_product_in_one_give_the_bits_of_one_after_the_other(name, dtype):
    rng = torch.Generator().manual_seed(3)
    sizes, ffn = torch.tensor([3, 0, 9, 4]), 8
    inner = torch.randn(16, ffn * (2 if _kind(name).gated else 1), generator=rng).to(dtype)
    probs = torch.rand(16, generator=rng).to(compute_dtype(dtype))
    weight = torch.randn(4, 24, ffn, generator=rng).to(dtype)
    results = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (inner, probs, weight)]
        if fused:
            out = activated_product(*leaves, sizes, kind=_kind(name))
        else:
            out = grouped_mm(weighted_activation(*leaves[:2], kind=_kind(name)), leaves[2], sizes)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
