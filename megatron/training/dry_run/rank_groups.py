"""Stand-ins for the process groups of one rank of any world: names, ranks, places; no backend."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.core.parallel_layout import ParallelLayout
from megatron.core.process_groups_config import ProcessGroupCollection, rank_lists


@dataclass(frozen=True)
class RankGroup:
    """What code asks a process group for; it cannot communicate."""

    name: str
    """Field of ``ProcessGroupCollection``."""
    ranks: tuple[int, ...]
    place: int

    def rank(self) -> int:
        """Return the place of this rank in the group."""
        return self.place

    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class GroupTable:
    """All groups of a world."""

    layout: ParallelLayout

    @cached_property
    def lists(self) -> dict[str, list[list[int]]]:
        """Field of ``ProcessGroupCollection`` -> the rank lists of all its groups."""
        return rank_lists(self.layout)

    @cached_property
    def canonical(self) -> dict[str, str]:
        """Field -> the first field that has the same rank lists."""
        first: dict[tuple[tuple[int, ...], ...], str] = {}
        return {
            name: first.setdefault(tuple(map(tuple, lists)), name)
            for name, lists in self.lists.items()
        }

    @cached_property
    def _place_of(self) -> dict[str, list[tuple[tuple[int, ...], int]]]:
        found: dict[str, list[tuple[tuple[int, ...], int]]] = {}
        for name, lists in self.lists.items():
            places: dict[int, tuple[tuple[int, ...], int]] = {}
            for ranks in map(tuple, lists):
                places |= {rank: (ranks, place) for place, rank in enumerate(ranks)}
            found[name] = [places[rank] for rank in range(self.layout.world_size)]
        return found

    def collection(self, rank: int) -> ProcessGroupCollection:
        """Return the groups of ``rank``."""
        groups: dict[str, Any] = {}
        for name in self.lists:
            groups[name] = RankGroup(name, *self._place_of[name][rank])
        return ProcessGroupCollection(**groups)
