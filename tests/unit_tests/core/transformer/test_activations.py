"""Activations against their formulas."""

import pytest
import torch
from torch import Tensor, nn

from megatron.core.transformer.activations import activation_of, gelu, swiglu
from megatron.core.transformer.config.activation import ActivationConfig
from tests.reference.activations import ACTIVATIONS, OPTIONS


def _inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_formula(name: str) -> None:
    x = _inputs(3, 2, 10)
    got = activation_of(ActivationConfig(**OPTIONS[name]).activation_kind)(x)
    want = ACTIVATIONS[name](x)
    assert got.shape == want.shape
    weight = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    (grad,) = torch.autograd.grad((got * weight).sum(), x)
    (wanted,) = torch.autograd.grad((want * weight).sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_options_say_whether_there_are_three_matrices(name: str) -> None:
    config = ActivationConfig(**OPTIONS[name])
    assert not list(config.activation_problems())
    assert config.gated_linear_unit is ACTIVATIONS[name].gated
    assert tuple(config.activation_kind) == tuple(ACTIVATIONS[name])


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"gelu", "swiglu"}))
def test_bf16_is_computed_in_fp32_and_rounded_once(name: str) -> None:
    function = activation_of(ActivationConfig(**OPTIONS[name]).activation_kind)
    narrow = _inputs(3, 10, dtype=torch.bfloat16)
    wide = narrow.detach().float().requires_grad_()
    results = []
    for x in (narrow, wide):
        out = function(x)
        (grad,) = torch.autograd.grad(out, x, torch.full_like(out, 0.5))
        results.append([y.bfloat16() for y in (out, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_only_the_input_is_kept_for_backward(name: str) -> None:
    x, kept = _inputs(3, 10), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        activation_of(ActivationConfig(**OPTIONS[name]).activation_kind)(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    x = _inputs(3, 2, 10)
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up)


def test_swiglu_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(swiglu, _inputs(3, 10))


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), x * torch.special.ndtr(x))
    assert not torch.allclose(gelu(x), nn.functional.gelu(x, approximate="tanh"), atol=1e-5)
