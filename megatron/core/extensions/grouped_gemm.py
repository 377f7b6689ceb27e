"""The grouped_gemm package, when it is installed. Imported when it is used, never with this file.

Its ``ops.gmm(a, b, batch_sizes, trans_b)`` takes bf16 matrices and sizes on the host.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.extensions import torch_native
from megatron.core.extensions.registry import register


@cache
def unusable() -> str | None:
    """Say why ``grouped_gemm.ops.gmm`` cannot be used here, or None."""
    if importlib.util.find_spec("grouped_gemm") is None:
        return "not installed"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        importlib.import_module("grouped_gemm.ops").gmm  # noqa: B018
    except (ImportError, AttributeError) as error:
        return f"installed, but without grouped_gemm.ops.gmm ({error})"
    return None


@register(
    "grouped_mm",
    "grouped_gemm",
    prefer=-1,
    why="on request; bf16 only, and it waits for the device in each product",
    unusable=unusable,
)
def grouped_mm(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """See ``torch_native.grouped_mm``; bf16 only."""
    if rows.shape[0] == 0:  # the package takes no empty product
        return torch_native.grouped_mm(rows, weight, tokens_per_expert)
    gmm = importlib.import_module("grouped_gemm.ops").gmm
    whole = _ZerosWithoutRows.apply(weight, tokens_per_expert)
    out: Tensor = gmm(rows.contiguous(), whole, tokens_per_expert.cpu(), trans_b=True)
    return out


class _ZerosWithoutRows(torch.autograd.Function):
    """The weight as it is; in its gradient the block of an expert without rows is zeros.

    The package need not write to that block.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_per_expert)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens_per_expert,) = ctx.saved_tensors
        return grad.masked_fill((tokens_per_expert == 0).view(-1, 1, 1), 0.0), None
