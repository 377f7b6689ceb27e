"""Windows, sinks and caps give on CUDA what blocks on a CPU give, and wait for no device."""

import pytest
import torch
from torch import Tensor

from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.blocked_attention import blocked_causal_attention
from megatron.core.transformer.dot_product_attention import causal_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES = {
    "sink": {},
    "window": {"window": 100},
    "short window": {"window": 3},
    "cap": {"softcap": 5.0, "window": 200},
}


def _inputs(dtype: torch.dtype, device: str, value_dim: int) -> list[Tensor]:
    """Query, key, value and sinks."""
    rng = torch.Generator().manual_seed(3)
    shapes = [(2, 8, 300, 64), (2, 2, 300, 64), (2, 2, 300, value_dim), (8,)]
    drawn = [torch.randn(shape, generator=rng) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


@pytest.mark.parametrize("value_dim", [64, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_cpu(case, dtype, value_dim):
    wide = torch.float64
    *inputs, sinks = _inputs(dtype, "cuda", value_dim)
    twins = [x.detach().to("cpu", wide).requires_grad_() for x in (*inputs, sinks)]
    weighting = Weighting(**CASES[case], sink=sinks)
    out = causal_attention(*inputs, None, weighting)  # libraries make themselves ready
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = causal_attention(*inputs, None, weighting)
        got = torch.autograd.grad(out.sum(), [*inputs, sinks])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = blocked_causal_attention(*twins[:3], None, weighting._replace(sink=twins[3]))
    wanted = torch.autograd.grad(expected.sum(), twins)
    tolerance = 1e-10 if dtype == wide else 3e-2
    for one, other in zip((out, *got), (expected, *wanted), strict=True):
        error = (one.cpu().to(wide) - other).norm() / other.norm()
        assert error <= tolerance
