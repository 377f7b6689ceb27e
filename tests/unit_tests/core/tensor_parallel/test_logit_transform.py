"""Logits multiplied and capped before their softmax: losses and gradients against torch's."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.tensor_parallel import cross_entropy
from megatron.core.tensor_parallel.cross_entropy import LogitTransform, linear_cross_entropy
from megatron.core.tensor_parallel.region_entry import RegionEntry
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import TOLERANCES

TRANSFORMS = [LogitTransform(0.3), LogitTransform(1.0, 2.0), LogitTransform(1.7, 3.0)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 21 rows several chunks, the last one short."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", {"cpu": 0, "kept": 0})
    monkeypatch.setattr(cross_entropy, "_MIN_ROWS", 4)


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn((7, 3, 16), generator=generator).to(dtype)
    weight = torch.randn((50, 16), generator=generator).to(dtype)
    return hidden, weight, torch.randint(50, (7, 3), generator=generator)


def _by_torch(transform: LogitTransform, dtype: torch.dtype) -> list[torch.Tensor]:
    """Loss and both gradients, in fp64, of operands that ``dtype`` has rounded."""
    hidden, weight, labels = _operands(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.T).flatten(0, 1) * transform.multiplier
    if transform.softcap is not None:
        logits = transform.softcap * (logits / transform.softcap).tanh()
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    loss = loss.view(labels.shape)
    (loss * _upstream(loss)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def _upstream(loss: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0, 2, 21, dtype=loss.dtype).view(7, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_loss_and_gradients_equal_torch(transform: LogitTransform, dtype: torch.dtype) -> None:
    hidden, weight, labels = _operands(dtype)
    loss = linear_cross_entropy(
        hidden.requires_grad_(), weight.requires_grad_(), labels, transform=transform
    )
    (loss * _upstream(loss)).sum().backward()
    tolerance = TOLERANCES[dtype]
    if dtype == torch.bfloat16:  # logits of 10 are rounded by 0.03
        tolerance = {"rtol": 5e-2, "atol": 1e-1}
    for got, want in zip(
        (loss.detach(), hidden.grad, weight.grad), _by_torch(transform, dtype), strict=True
    ):
        torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_loss_and_logits_agree(transform: LogitTransform) -> None:
    hidden, weight, labels = _operands(torch.float64)
    loss = linear_cross_entropy(hidden, weight, labels, transform=transform)
    logits = transform.of(hidden @ weight.T)
    want = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    torch.testing.assert_close(loss.flatten(), want, rtol=1e-13, atol=1e-13)


def test_no_transform_returns_the_logits_themselves() -> None:
    logits = torch.randn(3, 5)
    assert LogitTransform().of(logits) is logits


def test_fp16_keeps_the_gradients_of_capped_logits() -> None:
    hidden, weight, labels = _operands(torch.float16)
    transform = LogitTransform(0.5, 30.0)
    loss = linear_cross_entropy(
        hidden.requires_grad_(), weight.requires_grad_(), labels, transform=transform
    )
    (loss * _upstream(loss)).sum().backward()
    _, d_hidden, d_weight = _by_torch(transform, torch.float16)
    torch.testing.assert_close(hidden.grad.double(), d_hidden, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad.double(), d_weight, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("transform", [LogitTransform(), *TRANSFORMS], ids=str)
def test_a_split_vocabulary_is_transformed_as_the_whole(
    transform: LogitTransform, dtype: torch.dtype
) -> None:
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # slow to import, before the fork
    run_ranks(_of_a_slice, 2, transform, dtype)


def _of_a_slice(transform: LogitTransform, dtype: torch.dtype) -> None:
    hidden, weight, labels = _operands(dtype)
    group = dist.group.WORLD
    assert group is not None
    own = slice(25 * group.rank(), 25 * group.rank() + 25)
    part = weight[own].clone().requires_grad_()
    loss = linear_cross_entropy(
        hidden.requires_grad_(), part, labels, RegionEntry(group), transform=transform
    )
    (loss * _upstream(loss)).sum().backward()
    want_loss, d_hidden, d_weight = _by_torch(transform, torch.float64)
    close = {"rtol": 1e-12, "atol": 1e-12}
    if dtype != torch.float64:  # compiled, but for the cap
        close = {"rtol": 1e-5, "atol": 1e-5}
    for got, want in (
        (loss.detach(), want_loss),
        (hidden.grad, d_hidden),
        (part.grad, d_weight[own]),
    ):
        assert got is not None
        torch.testing.assert_close(got.double(), want, **close)
