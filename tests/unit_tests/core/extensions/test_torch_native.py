"""grouped_mm against one matrix product after another, in every dtype it takes."""

import pytest
import torch

from megatron.core.extensions.torch_native import adam, grouped_mm

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def _inputs(sizes, width_in, width_out, dtype):
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(sizes), width_in, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(len(sizes), width_out, width_in, generator=rng).to(dtype)
    return rows, weight.requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(3, 0, 16, 1), (0, 0, 0), (0, 4), (5,)])
@pytest.mark.parametrize("widths", [(16, 24), (7, 5)])  # 7 does not fill 16 bytes
def test_products_and_gradients_equal_a_loop_over_experts(dtype, sizes, widths):
    rows, weight = _inputs(sizes, *widths, dtype)
    out = grouped_mm(rows, weight, torch.tensor(sizes))
    want = torch.cat([x @ w.t() for x, w in zip(rows.split(sizes), weight, strict=True)])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):  # an expanded gradient first
        got = torch.autograd.grad(loss(out), (rows, weight), retain_graph=True)
        expected = torch.autograd.grad(loss(want), (rows, weight), retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=5 * tolerance, atol=20 * tolerance)


def test_an_expert_without_rows_has_a_zero_gradient_not_none():
    rows, weight = _inputs((2, 0), 8, 8, torch.float32)
    grouped_mm(rows, weight, torch.tensor([2, 0])).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].any()
    assert not weight.grad[1].any()


def test_adam_moments_have_the_names_that_checkpoints_use():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = adam([{"params": [p], "weight_decay": 0.1}], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    p.grad = torch.ones(4)
    optimizer.step()
    assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys()
    torch.testing.assert_close(p.detach(), torch.full((4,), 1.0 - 0.1 * 0.1 - 0.1))
