"""The compiled softmax of logits against fp64, and cross entropy with it against torch's way."""

import pytest
import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import compiler
from megatron.core.cpu_kernels.choice import using
from megatron.core.tensor_parallel import cross_entropy
from megatron.core.tensor_parallel.cross_entropy import LogitTransform, linear_cross_entropy
from megatron.core.tensor_parallel.softmax_kernel import softmax_kernel
from megatron.core.tensor_parallel.wide_room import borrow, give_back

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


def _draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize(("rows", "width", "columns"), [(3, 1, 1), (5, 77, 70), (2, 8192, 8192)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponentials_and_sums_are_those_of_fp64(
    dtype: torch.dtype, rows: int, width: int, columns: int
) -> None:
    logits = _draw(dtype, rows, width, scale=20.0)
    exact = logits.double()[:, :columns] * 0.5
    want = (exact - exact.amax(1, keepdim=True)).exp()
    kernel = softmax_kernel(logits)
    assert kernel is not None
    assert torch.equal(kernel.max(logits, columns, 0.5).double(), exact.amax(1))
    tops, totals = kernel.exp_(logits, columns, 0.5)
    torch.testing.assert_close(totals.double(), want.sum(1), rtol=5e-7, atol=0.0)
    half_unit = torch.finfo(dtype).eps / 2
    close = {"rtol": 1.01 * half_unit + 6e-6, "atol": 1e-37}
    torch.testing.assert_close(logits[:, :columns].double(), want, **close)
    assert not logits[:, columns:].any()
    assert torch.equal(tops.double(), exact.amax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_without_a_number_give_none(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 40, dtype=dtype)
    logits[0, 3], logits[1, 35] = float("nan"), float("inf")
    logits[2] = -float("inf")
    logits[3, :39] = -float("inf")
    kernel = softmax_kernel(logits)
    assert kernel is not None
    _, totals = kernel.exp_(logits, 40)
    assert totals.isnan().tolist() == [True, True, True, False]
    assert totals[3] == 1.0
    assert logits[3].tolist() == [0.0] * 39 + [1.0]


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.25, None, 45)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_against_fp64_are_those_of_torch(
    dtype: torch.dtype, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compiled = cross_entropy._compiled_softmax
    monkeypatch.setattr(
        cross_entropy, "_compiled_softmax", lambda *a: calls.append(1) or compiled(*a)
    )
    hidden, weight = _draw(dtype, 21, 16), _draw(dtype, 50, 16, scale=2.0)
    labels = torch.randint(45, (21,), generator=torch.Generator().manual_seed(0))

    def results(wide: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, labels, transform=transform)
        upstream = torch.linspace(0.1, 2.0, 21).to(loss.dtype)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    exact = results(torch.float64)
    with using("torch"):
        theirs = results(dtype)
    assert not calls
    ours = results(dtype)
    assert calls
    for one, other, want in zip(ours, theirs, exact, strict=True):
        error, bound = ((t.double() - want).abs().max().item() for t in (one, other))
        assert error <= max(1.5 * bound, 2 * torch.finfo(dtype).eps * want.abs().max().item())


def test_a_sure_model_keeps_its_small_gradient_in_bf16() -> None:
    hidden = torch.eye(16, dtype=torch.bfloat16)[:1].mul(10.0).requires_grad_()
    weight = torch.zeros(8, 16, dtype=torch.bfloat16)
    weight[2, 0] = 1.0
    linear_cross_entropy(hidden, weight, torch.tensor([2])).sum().backward()
    rest = 7 / (7 + torch.tensor(10.0, dtype=torch.float64).exp())
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0, 0].double(), -rest, rtol=1e-2, atol=0.0)


def test_memory_that_was_given_back_is_lent_again_and_old_content_is_guarded() -> None:
    like = torch.empty(0)
    first = borrow(2048, 2304, like)
    place = first.data_ptr()
    give_back(first)
    assert borrow(8, 8, like).data_ptr() != place
    second = borrow(2040, 2304, like)
    assert second.data_ptr() == place
    assert borrow(2040, 2304, like).data_ptr() != place

    hidden, weight = torch.zeros(2048, 4).requires_grad_(), torch.zeros(2304, 4).requires_grad_()
    labels = torch.zeros(2048, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, labels).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)  # nobody has borrowed it since
    linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
