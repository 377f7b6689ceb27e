"""Compiled norms against those of torch and against fp64."""

import pytest
import torch
from torch import Tensor, nn

from megatron.core.cpu_kernels.build import compiler
from megatron.core.cpu_kernels.choice import using
from megatron.core.transformer import torch_norm
from megatron.core.transformer.norm_kernel import CompiledNorm, norm_kernel
from megatron.core.transformer.torch_norm import LayerNorm, RMSNorm
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
OPTIONS = {torch.float32: {"fp64": False}, torch.bfloat16: {"fp64": False, "bf16": True}}
KINDS = [RMSNorm, LayerNorm]


def _made(kind: type, dtype: torch.dtype, width: int, **more: object) -> nn.Module:
    norm: nn.Module = kind(tiny_config(**OPTIONS[dtype], layernorm_epsilon=1e-3, **more), width)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in norm.parameters():
            param.copy_(torch.randn(width, generator=generator) + 1)
    return norm


def _results(norm: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    out = norm(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *norm.parameters()], upstream)]


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 37), (130, 512), (2, 4099)])
@pytest.mark.parametrize("dtype", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_against_fp64_are_those_of_torch(
    kind: type, dtype: torch.dtype, rows: int, width: int, zero_centred: bool
) -> None:
    norm = _made(kind, dtype, width, layernorm_zero_centered_gamma=zero_centred)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).add(0.5).to(dtype).requires_grad_()
    upstream = torch.randn(rows, width, generator=generator).to(dtype)
    ours = _results(norm, x, upstream)
    assert _taken(norm(x)) == "CompiledNormBackward"
    with using("torch"):
        theirs = _results(norm, x, upstream)
        assert _taken(norm(x)) != "CompiledNormBackward"
    twin = kind(tiny_config(layernorm_zero_centered_gamma=zero_centred), width)
    twin.eps = 1e-3
    twin.load_state_dict(norm.state_dict())
    exact = _results(twin, x.detach().double().requires_grad_(), upstream.double())
    for one, other, want in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        scale = want.abs().max().item() if want.numel() else 0.0
        floor = 2 * torch.finfo(dtype).eps * scale
        assert _error(one, want) <= max(1.5 * _error(other, want), floor)


def _taken(out: Tensor) -> str:
    assert out.grad_fn is not None
    return out.grad_fn.name()


def _error(one: Tensor, want: Tensor) -> float:
    return (one.double() - want).abs().max().item() if want.numel() else 0.0


@pytest.mark.parametrize("dtype", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_no_other_row_and_strides_do_not_matter(
    kind: type, dtype: torch.dtype
) -> None:
    norm = _made(kind, dtype, 48)
    x = torch.randn(70, 2, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, *_ = _results(norm, x.requires_grad_(), x.detach())
    _, d_whole, *_ = _results(norm, x, x.detach())
    for part in (x.detach()[5:6], x.detach()[:, 1], x.detach().transpose(0, 1)):
        leaf = part.requires_grad_()
        out, d_x, *_ = _results(norm, leaf, part.detach())
        place = {1: slice(5, 6), 70: (slice(None), 1)}.get(len(part))
        want, d_want = (
            t.transpose(0, 1) if place is None else t[place]  # type: ignore[index]
            for t in (whole, d_whole)
        )
        assert torch.equal(out, want)
        assert torch.equal(d_x, d_want)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: type) -> None:
    norm = _made(kind, torch.float32, 40)
    x = torch.randn(333, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(_results(norm, x, x.detach()))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_norms_in_fp64_and_without_memory_are_torch_s() -> None:
    for x in (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 8, device="meta")):
        assert norm_kernel(x) is None
    assert torch_norm.CompiledNorm is CompiledNorm
