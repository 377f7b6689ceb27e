"""Tensors of ours out of those on disk, and back, one at a time: copies between views."""

from collections.abc import Callable

import torch
from torch import Tensor

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
    """
    shape = plan.shapes[key]
    made = torch.zeros if plan.padding_of(key) else torch.empty
    target = made(shape, dtype=dtype)
    for piece in plan.pieces_of_key[key]:
        piece.ours.of(target).copy_(_source(plan, piece, read))
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
        piece.hf.of(target).copy_(piece.ours.of(last[1]))
    return target


def is_equal(plan: WeightPlan, key: str, ours: Tensor, again: Tensor) -> bool:
    """Compare two tensors of ours bit for bit, but for rows that pad the vocabulary."""
    for piece in plan.pieces_of_key[key]:
        first, second = piece.ours.of(ours), piece.ours.of(again)
        if not torch.equal(_bits(first), _bits(second)):
            return False
    return True


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
