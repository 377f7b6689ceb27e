"""Which steps of a MoE layer one kernel computes on CUDA: chosen when a layer is built.

The kernels are in ``extensions/triton_kernels.py``. What they do not take (fp64, other devices)
torch computes, so that one layer works wherever its tensors are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.extensions import triton_ops
from megatron.core.transformer.config.activation import SWIGLU, ActivationKind
from megatron.core.transformer.moe import permutation
from megatron.core.transformer.moe.expert_activation import (
    IN_TORCH,
    Activation,
    ActivationGradient,
)
from megatron.core.transformer.moe.permutation import RowMover
from megatron.core.transformer.transformer_config import TransformerConfig


def row_mover(config: TransformerConfig) -> RowMover:
    """Return what copies and sums the rows of tokens."""
    wanted = config.moe_permute_fusion and triton_ops.unusable() is None
    return FUSED_ROWS if wanted else permutation.IN_TORCH


def cuda_activation(config: TransformerConfig) -> Activation:
    """Return what computes the weighted activation between grouped products."""
    wanted = config.bias_swiglu_fusion and config.activation_kind == SWIGLU
    return FUSED_SWIGLU if wanted and triton_ops.unusable() is None else IN_TORCH


class Standing(NamedTuple):
    """One row of the start-up banner."""

    op: str
    chosen: str
    why: str


def standing(config: TransformerConfig) -> list[Standing]:
    """Say of each step which kernel computes it on CUDA, and why."""
    why = triton_ops.unusable()
    fused = "one Triton kernel each way"
    mover = fused if row_mover(config) is FUSED_ROWS else why or "--no-moe-permute-fusion"
    off = "--no-bias-swiglu-fusion" if config.activation_kind == SWIGLU else "no plain SwiGLU"
    active = fused if cuda_activation(config) is FUSED_SWIGLU else why or off
    return [
        Standing(op, "triton" if text is fused else "torch", text)
        for op, text in (("moe_permute", mover), ("moe_activation", active))
    ]


def _gather(rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    fits = triton_ops.takes(rows) and dtype in triton_ops.DTYPES
    gather = triton_ops.gather_rows if fits else permutation.gather_in_torch
    return gather(rows, index, dtype)


def _add_up(rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    fits = triton_ops.takes(rows) and dtype in triton_ops.DTYPES
    add_up = triton_ops.sum_rows if fits else permutation.add_up_in_torch
    return add_up(rows, slots, dtype)


FUSED_ROWS = RowMover(_gather, _add_up)


def _activate(inner: Tensor, probs: Tensor, *, kind: ActivationKind) -> Tensor:
    if not triton_ops.takes(inner):
        return IN_TORCH.activate(inner, probs, kind=kind)
    assert kind == SWIGLU, f"only plain SwiGLU is fused, {kind=}"
    return triton_ops.swiglu(inner, probs)


def _differentiate(
    inner: Tensor, probs: Tensor, grad: Tensor, *, kind: ActivationKind
) -> ActivationGradient:
    if not triton_ops.takes(inner):
        return IN_TORCH.differentiate(inner, probs, grad, kind=kind)
    assert kind == SWIGLU, f"only plain SwiGLU is fused, {kind=}"
    return ActivationGradient(*triton_ops.swiglu_gradient(inner, probs, grad))


FUSED_SWIGLU = Activation(_activate, _differentiate)
