"""Where elements of one tensor lie in another: pairs of strided views, the same both ways.

A transform of layout (interleaving, halves, transposes, stacks, padding) is a list of ``Piece``: a
view of the tensor on disk and a view of ours, of equal shape. Copying the one to the other imports,
copying back exports; nothing is computed, so nothing is lost. Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

Index = tuple[int | tuple[int, int] | None, ...]
TensorT = TypeVar("TensorT")


@dataclass(frozen=True)
class View:
    """A part of a tensor, looked at as another shape."""

    shape: tuple[int, ...]
    """The whole tensor, as which it is looked at first; as many elements as it has."""
    index: Index = ()
    """For each dim of ``shape``: a place, a range (start, stop), or all of it (None, also for dims
    that are left out)."""
    order: tuple[int, ...] = ()
    """Permutation of the dims that stay; none when empty."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        index = (*self.index, *[None] * (len(self.shape) - len(self.index)))
        kept = [
            size if which is None else which[1] - which[0]
            for size, which in zip(self.shape, index, strict=True)
            if not isinstance(which, int)
        ]
        return tuple(kept[dim] for dim in self.order) if self.order else tuple(kept)

    def of(self, tensor: TensorT) -> TensorT:
        """Return the part of ``tensor`` (torch or numpy, contiguous); writing to it writes it."""
        whole = tensor.reshape(self.shape)  # type: ignore[attr-defined]
        part = whole[
            tuple(
                slice(None) if w is None else w if isinstance(w, int) else slice(*w)
                for w in self.index
            )
        ]
        if not self.order:
            return part  # type: ignore[no-any-return]
        permute = getattr(part, "permute", None) or part.transpose
        return permute(self.order)  # type: ignore[no-any-return]

    def rows(self, shape: tuple[int, ...]) -> "tuple[int, int, View] | None":
        """Return the part as first row, end and view of these rows, where it lies in few of them.

        So that a reader can leave the other rows of a tensor of ``shape`` in the file.
        """
        first = self.index[0] if self.index else None
        if first is None or len(shape) < 2 or not self.shape or self.shape[0] != shape[0]:
            return None
        start, stop = (first, first + 1) if isinstance(first, int) else first
        inner: int | None = 0 if isinstance(first, int) else None
        narrowed = View((stop - start, *self.shape[1:]), (inner, *self.index[1:]), self.order)
        return start, stop, narrowed


@dataclass(frozen=True)
class Piece:
    """Elements that are the same numbers in a tensor on disk and in one of ours."""

    hf_key: str
    hf: View
    key: str
    """Ours, without ``model.``."""
    ours: View

    def __post_init__(self) -> None:
        """Refuse views that cannot be copied to each other."""
        assert self.hf.part_shape == self.ours.part_shape, f"no copy: {self}"


def whole(shape: tuple[int, ...]) -> View:
    """Return the view of all of a tensor."""
    return View(shape)


def num_elements(view: View) -> int:
    """Return how many elements the part has."""
    return math.prod(view.part_shape)
