"""Whichever kernel DotProductAttention takes, the answer is the same."""

import pytest
import torch

from megatron.core.transformer import dot_product_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.forward_context import ForwardContext
from tests.helpers.models import tiny_config, world_of_one
from tests.helpers.tolerances import TOLERANCES


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_blocks_and_torch_kernel_agree(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    core = DotProductAttention(tiny_config(), layer_number=0, pg_collection=world_of_one())
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    mask = None
    if masked:
        mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
        mask[:, :, 4:, :4] = True
    results = []
    for short in (1024, 0):
        monkeypatch.setattr(dot_product_attention, "_SHORT", short)
        out = core(query, key, value, mask, ForwardContext())
        results.append([out, *torch.autograd.grad(out.square().sum(), [query, key, value])])
    assert results[0][0].shape == (9, 2, 32)
    torch.testing.assert_close(results[0], results[1], **TOLERANCES[torch.float64])
