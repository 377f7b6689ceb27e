"""Activations against their formulas."""

import torch

from megatron.core.transformer.activations import gelu, swiglu


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    x = torch.randn(3, 2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up)


def test_swiglu_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(swiglu, x.requires_grad_())


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), x * torch.special.ndtr(x))
