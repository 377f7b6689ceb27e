"""Memory for the widest matrix of a step, which the next step takes over.

On a CPU fresh memory of 32 MiB or more comes from the kernel page by page, which takes as long as
a bf16 product that fills it. So what is borrowed in a forward is kept when its backward gives it
back: one piece of each dtype. Who borrows it next overwrites it; torch notices if the matrix of
before is still to be read then, and raises.
"""

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 24
"""Smaller matrices come from the allocator's own stock."""
_kept: dict[torch.dtype, Tensor] = {}


def borrow(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return a matrix [rows, columns] of any content, of the dtype and on the device of ``like``.

    Without autograd.
    """
    flat = _kept.get(like.dtype)
    count = rows * columns
    if flat is None or not _is_worth_it(like, count) or not count <= flat.numel() <= 2 * count:
        return like.new_empty(rows, columns)
    del _kept[like.dtype]
    return flat[:count].view(rows, columns)


def give_back(matrix: Tensor) -> None:
    """Keep the memory of ``matrix`` for who borrows next; its content is not read any more."""
    base = matrix if matrix._base is None else matrix._base
    if _is_worth_it(matrix, matrix.numel()) and base.is_contiguous():
        _kept[matrix.dtype] = base.detach().view(-1)


def _is_worth_it(like: Tensor, count: int) -> bool:
    is_real = like.device.type == "cpu" and type(like) is Tensor
    return is_real and count * like.element_size() >= _LEAST_BYTES
