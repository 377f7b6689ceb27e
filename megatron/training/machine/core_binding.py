"""Cores of their own for the ranks that share a machine, so that they do not chase each other.

Whole physical cores, of one NUMA node where they fit. Only within what this process was given, and
not at all where a launcher or the user has given each rank a set of its own.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_NODES = Path("/sys/devices/system/node")
_CORES = Path("/sys/devices/system/cpu")
_given: frozenset[int] | None = None
"""Cores of this process before it was bound; None while it is not."""


class Binding(NamedTuple):
    """What was decided for this rank."""

    cores: tuple[int, ...]
    """Cores to run on; empty to leave the rank where it is."""
    why: str
    """A phrase for the log."""


def plan(
    available: frozenset[int],
    *,
    parent: frozenset[int],
    nodes: Mapping[int, int],
    siblings: Mapping[int, int],
    local_rank: int,
    local_world_size: int,
    threads: int,
) -> Binding:
    """Return the cores of a rank: disjoint from those of the others, together at most all.

    Args:
        available: Cores this process was given.
        parent: Cores of the process that launched it.
        nodes: Core -> NUMA node; 0 for cores that are not there.
        siblings: Core -> number of its physical core; the core itself when not there.
        local_rank: Of this rank on its machine.
        local_world_size: Ranks of the machine.
        threads: Threads that compute in a rank.
    """
    if local_world_size == 1:
        return Binding((), "")
    if available != parent:
        return Binding((), f"on cores {text(available)}, as launched")
    if len(available) < local_world_size:
        return Binding((), f"cores not bound ({len(available)} for {local_world_size} ranks)")
    if threads > len(available) // local_world_size:
        return Binding((), f"cores not bound ({threads} threads a rank are more than its share)")
    ordered = sorted(available, key=lambda core: (nodes.get(core, 0), siblings.get(core, core)))
    cores = _share(ordered, nodes, local_rank, local_world_size, threads)
    why = f"cores of its own for each rank (rank 0: {text(cores)} of {text(available)})"
    return Binding(tuple(cores), why)


def _share(
    ordered: Sequence[int], nodes: Mapping[int, int], rank: int, ranks: int, threads: int
) -> Sequence[int]:
    """Share nodes among ranks and the cores of a node among its ranks, if that works for all."""
    by_node: dict[int, list[int]] = {}
    for core in ordered:
        by_node.setdefault(nodes.get(core, 0), []).append(core)
    here = ranks // len(by_node)
    if ranks % len(by_node) or min(map(len, by_node.values())) // here < threads:
        return _piece(ordered, rank, ranks)
    return _piece(list(by_node.values())[rank // here], rank % here, here)


def _piece(cores: Sequence[int], number: int, pieces: int) -> Sequence[int]:
    """Cut ``cores`` into even pieces and return one."""
    return cores[number * len(cores) // pieces : (number + 1) * len(cores) // pieces]


def text(cores: Sequence[int] | frozenset[int]) -> str:
    """Write cores as the kernel does: 0-3,8."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and runs[-1][1] == core - 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def bind(local_rank: int, local_world_size: int, threads: int) -> str:
    """Bind this thread, and those it starts, to the cores of its rank; return a phrase.

    Threads that are already there, such as those of gloo, stay free.
    """
    global _given
    if not hasattr(os, "sched_setaffinity"):
        return "" if local_world_size == 1 else "cores not bound (only Linux offers it)"
    available = frozenset(os.sched_getaffinity(0))
    binding = plan(
        available,
        parent=_of_parent(available),
        nodes=_node_of_core(),
        siblings=_physical(available),
        local_rank=local_rank,
        local_world_size=local_world_size,
        threads=threads,
    )
    if binding.cores:
        os.sched_setaffinity(0, binding.cores)
        _given = available
    return binding.why


def unbind() -> None:
    """Give this thread back what it was launched with: readers of data leave the rank's cores."""
    global _given
    if _given is not None:
        os.sched_setaffinity(0, _given)
        _given = None


def _of_parent(own: frozenset[int]) -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(os.getppid()))
    except OSError:  # of another container
        return own


def _node_of_core() -> dict[int, int]:
    found: dict[int, int] = {}
    for path in _NODES.glob("node[0-9]*/cpulist"):
        found |= dict.fromkeys(parse(_read(path)), int(path.parent.name.removeprefix("node")))
    return found


def _physical(cores: frozenset[int]) -> dict[int, int]:
    """Return core -> first of the hardware threads that share its physical core."""
    found = {}
    for core in cores:
        listed = parse(_read(_CORES / f"cpu{core}" / "topology" / "thread_siblings_list"))
        found[core] = min(listed, default=core)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def parse(listed: str) -> list[int]:
    """Read the kernel's list of cores: ``0-3,8``."""
    cores: list[int] = []
    for part in listed.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores += range(int(first), int(last or first) + 1)
    return cores
