"""Compiled rotation against torch's, both directions, from and to strided heads."""

import pytest
import torch
from torch import Tensor

from megatron.core.cpu_kernels import build, choice
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.config.rotary import RotaryConfig
from megatron.core.transformer.rotary import RotaryTables, rotate, split_and_rotate

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

S, D = 37, 48


def _tables(dtype: torch.dtype, percent: float, interleaved: bool) -> RotaryTables:
    config = RotaryConfig(position_embedding_type="rope", rotary_interleaved=interleaved)
    rotary = RotaryEmbedding(config, channels=D, rotary_dim=int(D * percent))
    return rotary([range(3, 20), range(40, 60)], torch.empty(0, dtype=dtype), length=60)


def _mixed(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(S, 2, 3, 4, D, generator=generator).to(dtype)


def _all(mixed: Tensor, tables: RotaryTables | None) -> list[Tensor]:
    """Return heads split off, some rotated alone, and the gradient of the projection."""
    mixed = mixed.detach().requires_grad_()
    outs = [*split_and_rotate(mixed, tables), rotate(mixed[:, :, :, 1:3], tables)]
    outs.append(rotate(mixed[:, :, :, 0], tables))
    loss = sum((out * torch.linspace(-1, 1, S * D).view(S, D).to(out.dtype)).sum() for out in outs)
    (grad,) = torch.autograd.grad(loss, mixed)
    return [*(out.detach() for out in outs), grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("percent", "interleaved"), [(1.0, False), (1.0, True), (0.25, False), (0.25, True)]
)
def test_rotation_and_its_gradient_are_those_of_torch(
    percent: float, interleaved: bool, dtype: torch.dtype
) -> None:
    mixed, tables = _mixed(dtype), _tables(dtype, percent, interleaved)
    with choice.using("compiled"):
        got = _all(mixed, tables)
    with choice.using("torch"):
        plain = _all(mixed, tables)
        wide = tables._replace(cos=tables.cos.double(), sin=tables.sin.double())
        exact = _all(mixed.double(), wide)
    near = 1e-6 if dtype == torch.float32 else 8e-3
    for mine, theirs, right in zip(got, plain, exact, strict=True):
        assert mine.is_contiguous() == theirs.is_contiguous()
        error, largest = (mine - right).abs().max(), right.abs().max()
        assert error < near * largest
        assert error <= (theirs - right).abs().max() * 1.5 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_tables_bits_are_copied(dtype: torch.dtype) -> None:
    mixed = _mixed(dtype)
    with choice.using("compiled"):
        got = _all(mixed, None)
    with choice.using("torch"):
        assert all(map(torch.equal, got, _all(mixed, None)))


def test_every_rotation_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("torch's rotation")

    monkeypatch.setattr("megatron.core.transformer.rotary._rotate_by_torch", never)
    tables = _tables(torch.float32, 1.0, False)
    with choice.using("compiled"):
        _all(_mixed(torch.float32), tables)
    with choice.using("torch"), pytest.raises(AssertionError, match="torch's rotation"):
        _all(_mixed(torch.float32), tables)
