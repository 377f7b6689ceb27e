"""Weight gradients of bf16 operands in one pass: against fp64, and where torch computes them."""

import pytest
import torch

from megatron.core.cpu_kernels import choice
from megatron.core.cpu_kernels.weight_gradient import add_weight_gradient


def _operands(num_rows: int, out: int, width: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(num_rows)
    shapes = (num_rows, out), (num_rows, width), (out, width)
    grad, input_, total = (torch.randn(shape, generator=rng) for shape in shapes)
    return grad.bfloat16(), input_.bfloat16(), total


@pytest.fixture(autouse=True)
def has_it() -> None:
    if not add_weight_gradient(*_operands(1, 32, 32)):
        pytest.skip("needs a C++ compiler and a processor with tiles of bf16")


@pytest.mark.parametrize(("num_rows", "out", "width"), [(1, 32, 32), (7, 96, 160), (70, 224, 64)])
def test_it_is_no_further_from_fp64_than_torch(num_rows, out, width):
    grad, input_, total = _operands(num_rows, out, width)
    want = total.double() + grad.double().t() @ input_.double()
    in_torch = total.clone().add_(grad.t() @ input_)
    assert add_weight_gradient(grad, input_, total)
    error, error_of_torch = ((x - want).norm() / want.norm() for x in (total, in_torch))
    assert error < 1e-6
    assert error <= error_of_torch


def test_more_rows_than_a_slab_and_rows_that_lie_apart():
    grad, input_, total = _operands(1100, 64, 96)
    wide = torch.full((64, 128), 5.0)
    wide[:, :96] = total
    apart = [torch.cat((x, x), dim=1)[:, : x.shape[1]] for x in (grad, input_)]
    assert add_weight_gradient(*apart, wide[:, :96])
    want = total.double() + grad.double().t() @ input_.double()
    torch.testing.assert_close(wide[:, :96].double(), want, rtol=1e-5, atol=1e-4)
    assert (wide[:, 96:] == 5.0).all()


def test_no_rows_add_nothing():
    grad, input_, total = _operands(0, 64, 96)
    before = total.clone()
    assert add_weight_gradient(grad, input_, total)
    assert torch.equal(total, before)


def test_what_it_cannot_do_is_left_to_torch():
    grad, input_, total = _operands(5, 64, 96)
    refused = [
        (grad.float(), input_.float(), total),
        (grad, input_, total.bfloat16()),
        (grad[:, :40], input_, total[:40]),
        (grad, input_, total.t().contiguous().t()),
        (grad.to("meta"), input_.to("meta"), total.to("meta")),
    ]
    before = total.clone()
    assert not any(add_weight_gradient(*operands) for operands in refused)
    with choice.using("torch"):
        assert not add_weight_gradient(grad, input_, total)
    assert torch.equal(total, before)
    with pytest.raises(AssertionError):
        add_weight_gradient(grad, input_[:4], total)
