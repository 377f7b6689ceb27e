"""Cross entropy of fp16 hidden states: gradients reach fp16 wherever the scaled ones fit it."""

import pytest
import torch

from megatron.core.tensor_parallel.cross_entropy import linear_cross_entropy

HIDDEN, ROWS = 16, 24


def gradients(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float):
    """Return the loss of each row, and both gradients of their mean times ``scale``, without it."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    (loss.mean() * scale).backward()
    return loss.detach().double(), hidden.grad.double() / scale, weight.grad.double() / scale


def draw(vocab: int, spread: float):
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).half()
    weight = (torch.randn(vocab, HIDDEN, generator=generator) * spread).half()
    return hidden, weight, torch.randint(vocab, (ROWS,), generator=generator)


@pytest.mark.parametrize(
    ("vocab", "spread"),
    [(64, 0.3), (1000, 0.02), pytest.param(90_000, 1e-3, id="more_than_65504_even_ones")],
)
def test_gradients_are_those_of_fp64_up_to_fp16_rounding(vocab, spread):
    hidden, weight, labels = draw(vocab, spread)
    got = gradients(hidden, weight, labels, 2.0**10)
    want = gradients(hidden.double(), weight.double(), labels, 1.0)
    for one, other in zip(got, want, strict=True):
        error = (one - other).norm() / other.norm()
        assert error < 2e-3, error


def test_gradients_of_tokens_a_model_is_sure_of_survive():
    hidden, _, labels = draw(HIDDEN, 1.0)
    hidden[torch.arange(ROWS), labels] = torch.linspace(9, 12, ROWS).half()
    hidden, weight = hidden * 64, torch.eye(HIDDEN).half() / 64  # those were the logits
    loss, got, _ = gradients(hidden, weight, labels, 2.0**14)
    _, want, _ = gradients(hidden.double(), weight.double(), labels, 1.0)
    assert loss.min() > 1e-5  # of less fp32 itself has no digits
    assert loss.max() < 1e-2
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() / other.norm() < 2e-2


def test_a_row_without_gradient_gives_none():
    hidden, weight, labels = draw(64, 1.0)
    weight[labels[0]] = hidden[0].sign() * 100  # a margin at which every other exp is 0
    _, got, _ = gradients(hidden, weight, labels, 2.0**10)
    assert got.isfinite().all()
    assert not got[0].any()


def test_a_scale_that_is_too_large_shows_in_the_gradient():
    hidden, weight, labels = draw(64, 0.3)
    _, d_hidden, d_weight = gradients(hidden, weight, labels, 2.0**40)
    assert not d_hidden.isfinite().all()
    assert not d_weight.isfinite().all()
