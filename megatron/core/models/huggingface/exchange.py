"""Tensors of ours out of those on disk, and back, one at a time: copies between views."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.views import Piece
from megatron.core.models.huggingface.weight_plan import WeightPlan

Read = Callable[[str, tuple[int, int] | None], Tensor]
"""Name of the plan, rows wanted (None: all) -> the tensor on disk."""


def our_tensor(plan: WeightPlan, key: str, dtype: torch.dtype, read: Read) -> Tensor:
    """Make one of our tensors.

    Args:
        plan: Of the model.
        key: Ours, without ``model.``.
        dtype: Of the result; numbers on disk are rounded to it.
        read: Gives tensors on disk.

    Returns:
        Contiguous, on the CPU; padded rows of the vocabulary are zero.

    Raises:
        CheckpointError: It holds no real numbers, or some that fp16 has no room for.
    """
    shape = plan.shapes[key]
    made = torch.zeros if plan.padding_of(key) else torch.empty
    target = made(shape, dtype=dtype)
    for piece in plan.pieces_of_key[key]:
        _copy(_source(plan, piece, read), piece.ours.of(target), piece.hf_key)
    return target


def hf_tensor(
    plan: WeightPlan, hf_key: str, dtype: torch.dtype, read_ours: Callable[[str], Tensor]
) -> Tensor:
    """Make one of the tensors on disk; see ``our_tensor``."""
    target = torch.empty(plan.hf_shapes[hf_key], dtype=dtype)
    last: tuple[str, Tensor] | None = None
    for piece in plan.pieces_of_hf_key[hf_key]:
        if last is None or last[0] != piece.key:
            last = None  # before the next is read: at most one of ours is in memory
            last = (piece.key, read_ours(piece.key))
        _copy(piece.ours.of(last[1]), piece.hf.of(target), piece.key)
    return target


def is_equal(plan: WeightPlan, key: str, ours: Tensor, again: Tensor) -> bool:
    """Compare two tensors of ours bit for bit, but for rows that pad the vocabulary."""
    for piece in plan.pieces_of_key[key]:
        first, second = piece.ours.of(ours), piece.ours.of(again)
        if not torch.equal(_bits(first), _bits(second)):
            return False
    return True


def _copy(source: Tensor, target: Tensor, name: str) -> None:
    """Copy numbers; refuse to make infinite what is finite."""
    if not source.is_floating_point():
        raise CheckpointError(f"{name} holds {source.dtype}, and weights are real numbers")
    target.copy_(source)
    if target.dtype != torch.float16 or source.dtype == torch.float16 or not target.numel():
        return
    if _is_infinite(target) and not _is_infinite(source):
        largest = source.abs().max().item()
        raise CheckpointError(
            f"{name} holds {largest:g}, and fp16 ends at 65504: use bf16 or fp32 instead"
        )


def _is_infinite(tensor: Tensor) -> bool:
    return any(bool(end.isinf()) for end in tensor.aminmax())


def _bits(tensor: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def _source(plan: WeightPlan, piece: Piece, read: Read) -> Tensor:
    shape = plan.hf_shapes[piece.hf_key]
    part = piece.hf.rows(shape)
    if part is None:
        return piece.hf.of(read(piece.hf_key, None))
    start, stop, view = part
    return view.of(read(piece.hf_key, (start, stop)))
