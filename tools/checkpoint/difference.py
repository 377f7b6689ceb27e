"""Two checkpoints side by side, by global name: what differs first, and what differs most.

One tensor of each is in memory at a time, and none where hashes of equal blocks say enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.training.resume_rules import flat
from tools.checkpoint.keys import model_order

_AT_ONCE = 1 << 20
_STATE = ("iteration", "consumed_train_samples", "dropout_seed", "data_fingerprint")


class Place(NamedTuple):
    """An element that differs."""

    key: str
    element: tuple[int, ...]
    """Index in the whole tensor."""
    values: tuple[float, float]
    size: float
    """How far apart, where it is the largest of its kind; absolute or relative."""

    def __str__(self) -> str:
        first, second = self.values
        return f"{self.key}{list(self.element)}: {first!r} and {second!r}"


@dataclass
class Difference:
    """What two checkpoints differ in."""

    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    """Lines about tensors of another shape or dtype."""
    state: list[str] = field(default_factory=list)
    """Lines about iteration, optimizer, architecture, schedule."""
    options: list[str] = field(default_factory=list)
    """Lines about other options, which make no checkpoint another one."""
    equal: int = 0
    """Tensors that are equal bit by bit."""
    equal_by_hash: int = 0
    """Of them, those that were not read."""
    different: list[str] = field(default_factory=list)
    """Keys of tensors with other values, in the order of the model."""
    first: Place | None = None
    largest: Place | None = None
    largest_relative: Place | None = None

    @property
    def is_equal(self) -> bool:
        """Whether nothing but options differs."""
        found = self.only_first, self.only_second, self.facts, self.state, self.different
        return not any(found)

    def data(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        places = {
            name: None if place is None else place._asdict()
            for name, place in (
                ("first", self.first),
                ("largest", self.largest),
                ("largest_relative", self.largest_relative),
            )
        }
        return {"equal": self.is_equal} | {
            "only_first": self.only_first,
            "only_second": self.only_second,
            "facts": self.facts,
            "state": self.state,
            "options": self.options,
            "equal_tensors": self.equal,
            "equal_by_hash": self.equal_by_hash,
            "different": self.different,
            **places,
        }


def difference(
    first: StoredCheckpoint, second: StoredCheckpoint, keys: Sequence[Sequence[str]]
) -> Difference:
    """Compare two checkpoints, whatever layouts saved them.

    Args:
        first: A checkpoint.
        second: Another one.
        keys: Of the first and of the second, those to compare.

    Raises:
        CheckpointError: A block is damaged.
    """
    mine, other = map(set, keys)
    found = Difference(
        only_first=sorted(mine - other, key=model_order),
        only_second=sorted(other - mine, key=model_order),
        state=list(_state_lines(first.common, second.common)),
        options=list(_option_lines(first.common, second.common)),
    )
    for key in sorted(mine & other, key=model_order):
        facts = first.facts(key), second.facts(key)
        if facts[0] != facts[1]:
            found.facts.append(f"{key}: {facts[0]} and {facts[1]}")
        elif first.block_hashes(key) == second.block_hashes(key):
            found.equal += 1
            found.equal_by_hash += 1
        else:
            _compare(found, key, first.read(key), second.read(key))
    return found


def _compare(found: Difference, key: str, first: Tensor, second: Tensor) -> None:
    shape, differs = tuple(first.shape), False
    one, two = first.reshape(-1), second.reshape(-1)
    for start in range(0, max(one.numel(), 1), _AT_ONCE):
        a, b = one[start : start + _AT_ONCE], two[start : start + _AT_ONCE]
        bits = (a.view(torch.uint8) != b.view(torch.uint8)).view(-1, a.element_size()).any(dim=1)
        if not bits.any():
            continue
        place = int(bits.nonzero()[0])
        if found.first is None:
            found.first = _place(key, shape, start + place, a[place], b[place], 0.0)
        differs = True
        apart = (a.double() - b.double()).abs().nan_to_num(nan=float("inf")).where(bits, 0.0)
        scale = torch.maximum(a.double().abs(), b.double().abs())
        relative = torch.where(apart > 0, apart / scale, apart).nan_to_num(nan=float("inf"))
        for name, sizes in (("largest", apart), ("largest_relative", relative)):
            worst = int(sizes.argmax())
            known: Place | None = getattr(found, name)
            if known is None or float(sizes[worst]) > known.size:
                values = a[worst], b[worst]
                place_found = _place(key, shape, start + worst, *values, float(sizes[worst]))
                setattr(found, name, place_found)
    if differs:
        found.different.append(key)
    else:
        found.equal += 1


def _place(
    key: str, shape: tuple[int, ...], flat_index: int, first: Tensor, second: Tensor, size: float
) -> Place:
    index = []
    for length in reversed(shape):
        index.append(flat_index % length)
        flat_index //= length
    return Place(key, tuple(reversed(index)), (first.item(), second.item()), size)


def _state_lines(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    lines = [_line(name, first.get(name), second.get(name)) for name in _STATE]
    for name in ("optimizer", "architecture", "schedule"):
        one, two = first.get(name) or {}, second.get(name) or {}
        for entry in dict.fromkeys([*one, *two]):
            shown = entry if entry.startswith("-") else f"{name} {entry.replace('_', ' ')}"
            lines.append(_line(shown, one.get(entry), two.get(entry)))
    tokenizers = [(common.get("tokenizer") or {}).get("fingerprint") for common in (first, second)]
    lines.append(_line("tokenizer", *tokenizers))
    return [line for line in lines if line]


def _option_lines(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    one, two = flat(first["config"]), flat(second["config"])
    names = sorted(one.keys() | two.keys())
    lines = [_line(name, one.get(name), two.get(name)) for name in names]
    lines.append(_line("world_size", first["world_size"], second["world_size"]))
    return [line for line in lines if line]


def _line(name: str, first: object, second: object) -> str:
    return "" if first == second else f"{name.replace('_', ' ')}: {first} and {second}"
