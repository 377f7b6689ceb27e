"""The grouped_gemm package is called as it documents, and refused where it is not there."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron.core.errors import BackendError
from megatron.core.extensions import grouped_gemm, torch_native
from megatron.core.extensions.registry import resolve


class StrictGmm(torch.autograd.Function):
    """What the package documents and checks of gmm, on a CPU; empty blocks are left as rubbish."""

    @staticmethod
    def forward(ctx, a, b, batch_sizes, trans_b):
        assert a.ndim == 2
        assert b.ndim == 3
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert a.dtype == b.dtype == torch.bfloat16
        assert batch_sizes.dtype == torch.int64
        assert batch_sizes.device.type == "cpu"
        assert batch_sizes.ndim == 1
        assert int(batch_sizes.sum()) == len(a) > 0
        assert trans_b
        ctx.save_for_backward(a, b, batch_sizes)
        parts = a.split(batch_sizes.tolist())
        return torch.cat([part @ matrix.t() for part, matrix in zip(parts, b, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        a, b, batch_sizes = ctx.saved_tensors
        sizes = batch_sizes.tolist()
        grad_b = torch.full_like(b, float("nan"))
        for i, (g, x) in enumerate(zip(grad.split(sizes), a.split(sizes), strict=True)):
            if len(x):
                grad_b[i] = g.t() @ x
        parts = zip(grad.split(sizes), b, strict=True)
        return torch.cat([g @ matrix for g, matrix in parts]), grad_b, None, None


@pytest.fixture
def package(monkeypatch):
    """A package grouped_gemm with ``ops.gmm`` and nothing else."""
    ops = ModuleType("grouped_gemm.ops")
    ops.gmm = lambda a, b, batch_sizes, trans_b=False: StrictGmm.apply(a, b, batch_sizes, trans_b)
    monkeypatch.setitem(sys.modules, "grouped_gemm", ModuleType("grouped_gemm"))
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", ops)


def _results(product, sizes: list[int]) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(24, sum(sizes), generator=rng).bfloat16().t().requires_grad_()
    weight = torch.randn(len(sizes), 16, 24, generator=rng).bfloat16().requires_grad_()
    out = product(rows, weight, torch.tensor(sizes))
    return out, *torch.autograd.grad(out.square().sum(), (rows, weight))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 0], [8, 0, 0]])
def test_products_and_gradients_are_those_of_torch(sizes):
    for ours, theirs in zip(
        _results(grouped_gemm.grouped_mm, sizes),
        _results(torch_native.grouped_mm, sizes),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0.1)


def test_asked_for_and_not_there_is_told_with_the_package():
    if grouped_gemm.unusable() is None:
        pytest.skip("it can be used here")
    with pytest.raises(BackendError, match="grouped_gemm, which cannot be used"):
        resolve("grouped_mm", "grouped_gemm")
    assert resolve("grouped_mm") is torch_native.grouped_mm


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("cuda", "has_gmm", "reason"),
    [(False, True, "needs a CUDA device"), (True, False, "without"), (True, True, None)],
)
def test_it_counts_only_with_its_function_and_a_device(monkeypatch, cuda, has_gmm, reason):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    if not has_gmm:
        monkeypatch.delattr(sys.modules["grouped_gemm.ops"], "gmm")
    found = grouped_gemm.unusable.__wrapped__()
    assert (found is None) if reason is None else (reason in found)
