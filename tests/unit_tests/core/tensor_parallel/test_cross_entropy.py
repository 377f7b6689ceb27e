"""Both forms of cross entropy against torch's, losses and gradients."""

import pytest
import torch

from megatron.core.tensor_parallel import cross_entropy
from megatron.core.tensor_parallel.cross_entropy import (
    linear_cross_entropy,
    vocab_parallel_cross_entropy,
)
from tests.helpers.tolerances import TOLERANCES

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 21 rows several chunks, the last one short."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", {"cpu": 0, "kept": 0})
    monkeypatch.setattr(cross_entropy, "_MIN_ROWS", 4)


def _draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def _labels(*shape: int, vocab: int) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))


def _expected(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits.double().flatten(0, -2), labels.flatten(), reduction="none"
    ).view_as(labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient_of_logits_equal_torch(dtype: torch.dtype) -> None:
    logits = _draw(dtype, 7, 3, 50, scale=5.0).requires_grad_()
    labels = _labels(7, 3, vocab=50)
    upstream = torch.linspace(0, 2, 21).view(7, 3)
    twin = logits.detach().double().requires_grad_()

    loss = vocab_parallel_cross_entropy(logits, labels)
    (loss * upstream).sum().backward()
    expected = _expected(twin, labels)
    (expected * upstream).sum().backward()

    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = TOLERANCES[loss.dtype]
    torch.testing.assert_close(loss, expected.to(loss.dtype), **exact)
    torch.testing.assert_close(logits.grad, twin.grad.to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_of_hidden_and_weight_equal_torch(dtype: torch.dtype) -> None:
    hidden, weight = (
        _draw(dtype, 7, 3, 16).requires_grad_(),
        _draw(dtype, 50, 16, scale=0.5).requires_grad_(),
    )
    labels = _labels(7, 3, vocab=50)
    upstream = torch.linspace(0, 2, 21).view(7, 3)
    twins = [x.detach().double().requires_grad_() for x in (hidden, weight)]

    loss = linear_cross_entropy(hidden, weight, labels)
    (loss * upstream).sum().backward()
    expected = _expected(twins[0] @ twins[1].T, labels)
    (expected * upstream).sum().backward()

    torch.testing.assert_close(loss, expected.to(loss.dtype), **TOLERANCES[dtype])
    wider = {"rtol": 1.6e-2, "atol": 3e-2}  # sums of 50 or 21 rounded products
    for got, twin in zip((hidden, weight), twins, strict=True):
        torch.testing.assert_close(
            got.grad,
            twin.grad.to(dtype),
            **(wider if dtype == torch.bfloat16 else TOLERANCES[dtype]),
        )


def test_evaluation_gives_the_same_loss_as_training() -> None:
    hidden, weight = _draw(torch.float32, 21, 16), _draw(torch.float32, 50, 16)
    labels = _labels(21, vocab=50)
    training = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), training)


def test_backward_may_run_twice() -> None:
    hidden = _draw(torch.float64, 21, 16).requires_grad_()
    weight = _draw(torch.float64, 50, 16).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, _labels(21, vocab=50)).sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_confident_and_huge_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    for loss in (
        linear_cross_entropy(hidden, weight, labels),
        vocab_parallel_cross_entropy(hidden @ weight.T, labels),
    ):
        assert loss.tolist() == [0.0, 2e4]
        loss.sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_masked_tokens_give_no_gradient() -> None:
    hidden = _draw(torch.float32, 21, 16).requires_grad_()
    weight = _draw(torch.float32, 50, 16).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, _labels(21, vocab=50))
    (loss * torch.zeros(21)).sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()
