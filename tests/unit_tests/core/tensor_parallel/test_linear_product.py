"""Weight gradients of linear layers and of the loss, added to wider sums over two backwards."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from megatron.core.cpu_kernels.choice import using
from megatron.core.grad_sink import offer_grad_sink
from megatron.core.tensor_parallel.cross_entropy import linear_cross_entropy
from megatron.core.tensor_parallel.linear_product import linear

ROWS, WIDTH, OUT = 50, 32, 64


class Sums:
    """A sink that counts how often it is asked."""

    def __init__(self, sums: Tensor) -> None:
        self.sums, self.asked = sums, 0

    def __call__(self) -> Tensor:
        self.asked += 1
        return self.sums

    def put_off(self) -> None:
        raise AssertionError

    def settle(self) -> None:
        raise AssertionError


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _of_layer(x: Tensor, weight: Tensor) -> Tensor:
    return (linear(x, weight) * _draw(3, *x.shape[:-1], OUT).to(x.dtype)).sum()


def _of_loss(x: Tensor, weight: Tensor) -> Tensor:
    labels = torch.randint(OUT, x.shape[:-1], generator=torch.Generator().manual_seed(4))
    losses = linear_cross_entropy(x, weight, labels)
    return (losses * torch.linspace(0.5, 1.5, losses.numel()).view(losses.shape)).sum()


@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("body", [_of_layer, _of_loss])
def test_sums_over_backwards_are_those_of_fp64(
    body: object, dtype: torch.dtype, choice: Literal["torch", "auto"]
) -> None:
    assert callable(body)
    weight = _draw(0, OUT, WIDTH).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sink = Sums(torch.full((OUT, WIDTH), 7.0, dtype=wide))
    offer_grad_sink(weight, sink)
    twin = weight.detach().double().requires_grad_()
    with using(choice):
        for seed in (1, 2):
            x = _draw(seed, ROWS, 2, WIDTH).to(dtype)
            body(x.clone().requires_grad_(), weight).backward()
            body(x.double(), twin).backward()
    assert weight.grad is None
    assert sink.asked == 2
    assert twin.grad is not None
    want = twin.grad + 7.0
    # bf16: each element of the product is rounded, by torch, and so are operands of the loss's
    close = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(sink.sums.double(), want, rtol=close / 10, atol=close)
