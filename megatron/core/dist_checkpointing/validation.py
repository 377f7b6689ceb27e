"""What a checkpoint holds against what the ranks want: strict both ways, everything named.

Pure: no files, no process group.
"""

from collections.abc import Iterable, Mapping

from megatron.core.dist_checkpointing.index import TensorFacts

_SHOWN = 6


def mismatch_problem(
    stored: Mapping[str, TensorFacts], wanted: Iterable[Mapping[str, TensorFacts]]
) -> str:
    """Say what keeps the ranks from loading, as one text; empty when all fits.

    Args:
        stored: Key -> facts of what is on disk.
        wanted: For each rank, key -> facts of what it will load.
    """
    union: dict[str, TensorFacts] = {}
    for part in wanted:
        union.update(part)
    differing = [
        f"{key} is {stored[key]} on disk and {facts} in the model"
        for key, facts in union.items()
        if key in stored and stored[key] != facts
    ]
    kinds = {
        "missing in the checkpoint": [key for key in union if key not in stored],
        "in the checkpoint, but no rank of this run wants them": [
            key for key in stored if key not in union
        ],
        "of another shape or dtype": differing,
    }
    return "\n".join(
        f"{len(items)} tensors {kind}:" + _listed(items) for kind, items in kinds.items() if items
    )


def _listed(items: list[str]) -> str:
    more = f"\n  ... and {len(items) - _SHOWN} more" if items[_SHOWN:] else ""
    return "".join(f"\n  - {item}" for item in sorted(items)[:_SHOWN]) + more
