"""Ceilings of what a step may do, in counted_work.json; ``--write`` takes over today's counts.

    python -m tests.functional.counted_work_ceilings --write

What it changes is part of the commit that needs it, which says why.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.counted_work import counted_collectives, counted_step

CEILINGS = Path(__file__).with_name("counted_work.json")
ROOM = {
    "python_calls": 0.03,  # torch's own functions: differ between its releases
    "allocations": 0.03,  # rounding elsewhere may send a token to another expert, and then
    "allocated_bytes": 0.03,  # experts have other numbers of rows
    "product_flops": 0.03,
}
"""Name of a count -> share by which it may pass its ceiling; none for those not named."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "EP 2": {"expert_model_parallel_size": 2},
    "DP 2": {},
    "DP 2, distributed optimizer": {"use_distributed_optimizer": True},
    "TP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
}
STEPS: dict[str, Callable[[], dict[str, int]]] = {
    f"step, {kernels}, {'bf16' if bf16 else 'fp32'}": (
        lambda kernels=kernels, bf16=bf16: counted_step(kernels, bf16=bf16).numbers()
    )
    for kernels in ("torch", "compiled")
    for bf16 in (False, True)
}
COLLECTIVES: dict[str, Callable[[], dict[str, int]]] = {
    f"collectives, {name}": (lambda layout=layout: counted_collectives(**layout))
    for name, layout in LAYOUTS.items()
}
ALL = STEPS | COLLECTIVES


def ceilings() -> dict[str, dict[str, int]]:
    """Read the file: what is counted -> count -> ceiling."""
    return json.loads(CEILINGS.read_text())


def grown(name: str, counts: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """Return a line for each count above its ceiling, or without one."""
    return list(_grown(name, counts, allowed))


def _grown(name: str, counts: dict[str, int], allowed: dict[str, int]) -> Iterator[str]:
    for key, count in counts.items():
        ceiling = allowed.get(key)
        if ceiling is None:
            yield f"{name}: {key}: {count:,}, which has no ceiling: it is new"
        elif count > math.floor(ceiling * (1 + ROOM.get(key, 0.0))):
            share = f"{count / ceiling - 1:+.1%}" if ceiling else "from nothing"
            yield f"{name}: {key}: {count:,} instead of {ceiling:,} ({share})"


def advice(lines: list[str], largest: Sequence[str] = ()) -> str:
    """Return a message on what grew and how to accept it."""
    shown = ["", "A training step does more than it did:", *(f"  {line}" for line in lines)]
    if largest:
        shown += ["its largest tensors:", *(f"  {line}" for line in largest)]
    return "\n".join(
        [
            *shown,
            "If that is wanted: python -m tests.functional.counted_work_ceilings --write",
            "and say in the commit why.",
        ]
    )


def main() -> None:
    """Count everything; compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="Let today's counts be the ceilings.")
    args = parser.parse_args()
    counts = {name: count() for name, count in ALL.items()}
    before = ceilings() if CEILINGS.exists() else {}
    for name, found in counts.items():
        for key in sorted(found.keys() | before.get(name, {}).keys()):
            old, new = before.get(name, {}).get(key), found.get(key)
            if old != new:
                sys.stdout.write(f"{name}: {key}: {old} -> {new}\n")
    if args.write:
        CEILINGS.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
