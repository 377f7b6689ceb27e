"""Norms against their formulas in fp64."""

import pytest
import torch
from torch import Tensor

from megatron.core.transformer.torch_norm import LayerNorm, RMSNorm
from tests.helpers.models import tiny_config
from tests.helpers.tolerances import TOLERANCES

OPTIONS = {
    torch.float64: {"fp64": True},
    torch.float32: {"fp64": False},
    torch.bfloat16: {"fp64": False, "bf16": True},
}


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _layer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return _rms(centred, weight, eps) + bias


@pytest.mark.parametrize("dtype", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "formula"), [(RMSNorm, _rms), (LayerNorm, _layer)])
def test_output_and_gradients_equal_the_formula(
    kind: type, formula: object, dtype: torch.dtype
) -> None:
    norm = kind(tiny_config(**OPTIONS[dtype], layernorm_epsilon=0.1), 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in norm.parameters():
            param.copy_(torch.randn(24, generator=generator) + 1)
    x = torch.randn(5, 3, 24, generator=generator).add(0.5).to(dtype).requires_grad_()
    upstream = torch.randn(5, 3, 24, generator=generator).to(dtype)
    inputs = [x, *norm.parameters()]
    twins = [t.detach().double().requires_grad_() for t in inputs]

    out = norm(x)
    expected = formula(*twins, 0.1)
    torch.testing.assert_close(out, expected.to(dtype), **TOLERANCES[dtype])
    got = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, twins, upstream.double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other.to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_bf16_statistics_are_not_rounded_to_bf16(kind: type) -> None:
    norm = kind(tiny_config(fp64=False, bf16=True), 4096)
    with torch.no_grad():
        for param, value in zip(norm.parameters(), (1.0, 0.0), strict=False):
            param.fill_(value)
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = norm(x.requires_grad_()).double()
    assert out.square().mean().sqrt().item() == pytest.approx(1.0, abs=5e-4)
    (d_x,) = torch.autograd.grad(norm(x), x, x.detach())
    # a norm does not change when its input is scaled: no gradient along the input
    assert (d_x.double() * x.double()).mean().abs().item() < 2e-3
