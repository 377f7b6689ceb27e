"""The gradient of a table of vectors, returned or added to wider sums."""

import pytest
import torch
from torch import Tensor

from megatron.core.grad_sink import offer_grad_sink
from megatron.core.param_role import Init
from megatron.core.tensor_parallel.layers.vocab_embedding import Embedding
from tests.unit_tests.core.tensor_parallel.test_linear_product import Sums


def _table(dtype: torch.dtype) -> tuple[Embedding, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = Embedding(9, 5, init=Init(kind="zeros"), dtype=dtype)
    with torch.no_grad():
        table.weight.copy_(torch.randn(9, 5, generator=generator))
    ids = torch.tensor([[3, 3, 0], [8, 3, 0]])
    return table, ids, torch.randn(2, 3, 5, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_repeated_ids_are_summed_wide(dtype: torch.dtype) -> None:
    table, ids, upstream = _table(dtype)
    want = torch.zeros(9, 5, dtype=torch.float64)
    want.index_add_(0, ids.flatten(), upstream.double().flatten(0, 1))
    table(ids).backward(upstream)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(table.weight.grad.double(), want, rtol=rounding, atol=rounding)

    table.weight.grad = None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sink = Sums(torch.ones(9, 5, dtype=wide))
    offer_grad_sink(table.weight, sink)
    table(ids).backward(upstream)
    assert table.weight.grad is None
    assert sink.asked == 1
    rounding = 8 * torch.finfo(wide).eps
    torch.testing.assert_close(sink.sums.double(), want + 1.0, rtol=rounding, atol=rounding)
