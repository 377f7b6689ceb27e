"""The first difference between what must be and what is: bits, numbers, and their global place.

Knows tensors by global name; no ranks, no files.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.param_role import LogicalShard
from tools.layouts.compare import measure

Tensors = Mapping[str, Tensor]
"""Global key -> whole tensor."""
Keyed = tuple[str, LogicalShard]
"""A global key, and a block of its tensor on this rank."""
ALLOWED = 1e-12
"""Largest difference / largest element of the tensor, in fp64."""


class Difference(NamedTuple):
    """Where two states part."""

    when: str
    """``after loading``, ``step 4``, ..."""
    key: str
    """Global name of a tensor, or of a number."""
    place: tuple[int, ...] | None
    """Of the element in the whole tensor; None for what has no elements."""
    want: str
    got: str
    rank: int | None = None
    """Where it was seen; None for files."""

    def __str__(self) -> str:
        """Return a sentence."""
        at = "" if self.place is None else f"[{', '.join(map(str, self.place))}]"
        on = "" if self.rank is None else f" on rank {self.rank}"
        return f"{self.when}: {self.key}{at} is {self.got}{on}, must be {self.want}"


class Near(NamedTuple):
    """How far the worst of several tensors is off."""

    error: float
    """Largest difference / largest element of the tensor."""
    key: str
    first: Difference | None
    """The first that rounding cannot explain."""


def of_facts(when: str, got: Mapping[str, Any], want: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the entries that differ, and those that one of both lacks."""
    for key in want.keys() | got.keys():
        one, other = (str(facts.get(key, "missing")) for facts in (got, want))
        if one != other:
            yield Difference(when, key, None, other, one)


def of_keys(when: str, got: Iterable[str], want: Iterable[str]) -> Iterator[Difference]:
    """Yield keys that only one of both has, sorted."""
    mine, theirs = set(got), set(want)
    for key in sorted(mine ^ theirs):
        there, missing = "there", "missing"
        yield Difference(when, key, None, *((there, missing)[:: 1 if key in theirs else -1]))


def of_bits(when: str, blocks: Iterable[Keyed], want: Tensors) -> Iterator[Difference]:
    """Yield the first element of every block that is not what ``want`` holds there, bit for bit."""
    for key, block in blocks:
        if key not in want:
            yield Difference(when, key, None, "missing", "there")
            continue
        whole = want[key]
        if (tuple(whole.shape), whole.dtype) != (tuple(block.shape), block.tensor.dtype):
            yield Difference(when, key, None, _facts(whole), _facts(block.tensor, block.shape))
            continue
        theirs = whole[block.region]
        if (place := first_other_bit(block.tensor, theirs)) is not None:
            yield _of_element(when, key, block, place, theirs)


def first_other_bit(got: Tensor, want: Tensor) -> tuple[int, ...] | None:
    """Return the first place where two tensors of one shape and dtype differ in a bit."""
    if got.numel() == 0:
        return None
    mine, theirs = (
        x.contiguous().reshape(-1).view(torch.uint8).view(got.numel(), -1) for x in (got, want)
    )
    wrong = (mine != theirs).any(1).nonzero()
    return None if len(wrong) == 0 else _unravel(int(wrong[0]), tuple(got.shape))


def of_numbers(when: str, blocks: Iterable[Keyed], want: Tensors, allowed: float = ALLOWED) -> Near:
    """Compare blocks with their place in whole tensors, as far as rounding goes.

    Errors are in units of the largest element of the whole tensor, or of a thousandth of the
    largest of its kind: what is zero by symmetry is made of rounding alone.
    """
    kinds = scales(want)
    worst, of, first = 0.0, "", None
    for key, block in blocks:
        theirs = want[key][block.region]
        unit = max(want[key].abs().max().item(), 1e-3 * kinds[kind_of(key)], 1e-300)
        distance = (block.tensor.double() - theirs.double()).abs()
        error = distance.max().item() / unit if distance.numel() else 0.0
        error = math.inf if math.isnan(error) else error
        if error > worst:
            worst, of = error, key
        if first is None and error > allowed:
            place = _unravel(int((distance / unit).nan_to_num(math.inf).argmax()), distance.shape)
            first = _of_element(when, key, block, place, theirs)
    return Near(worst, of, first)


def of_values(
    when: str, got: Mapping[str, float | None], want: Mapping[str, float | None], allowed: float
) -> Near:
    """Compare numbers by name; an ``allowed`` of 0 asks for the same bits."""
    worst, of, first = 0.0, "", None
    for key, theirs in want.items():
        mine = got[key]
        if repr(mine) == repr(theirs):
            continue
        error = math.inf
        if mine is not None and theirs is not None:
            one, other = (torch.tensor([x], dtype=torch.float64) for x in (mine, theirs))
            error = measure(0, key, "", one, other).error
        if error > worst:
            worst, of = error, f"{key} of {when}"
        if first is None and not error <= allowed:
            first = Difference(when, key, None, repr(theirs), repr(mine))
    return Near(worst, of, first)


def kind_of(key: str) -> str:
    """Return ``model``, or the optimizer's state that a key is of."""
    return ".".join(key.split(".")[: 2 if key.startswith("optimizer.") else 1])


def scales(tensors: Tensors) -> dict[str, float]:
    """Return the largest element of each kind of tensors."""
    found: dict[str, float] = {}
    for key, tensor in tensors.items():
        kind = kind_of(key)
        found[kind] = max(found.get(kind, 0.0), tensor.abs().max().item())
    return found


def elements(tensors: Tensors) -> dict[str, int]:
    """Return the number of elements of each kind of tensors."""
    found: dict[str, int] = {}
    for key, tensor in tensors.items():
        found[kind_of(key)] = found.get(kind_of(key), 0) + tensor.numel()
    return found


def whole_blocks(tensors: Tensors) -> Iterator[Keyed]:
    """Yield whole tensors as blocks of themselves, in the order of their keys."""
    for key in sorted(tensors):
        tensor = tensors[key]
        yield key, LogicalShard(key, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def _of_element(
    when: str, key: str, block: LogicalShard, place: tuple[int, ...], theirs: Tensor
) -> Difference:
    there = tuple(a + b for a, b in zip(block.offset, place, strict=True))
    return Difference(when, key, there, *(repr(x[place].item()) for x in (theirs, block.tensor)))


def _facts(tensor: Tensor, shape: Iterable[int] | None = None) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {list(tensor.shape if shape is None else shape)}"


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        place.append(index % size)
        index //= size
    return tuple(reversed(place))
