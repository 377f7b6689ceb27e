"""Checkpoints of Megatron-LM itself, told by their files: refused with the way round, never read.

They are pickles, or need Megatron's own classes to be understood; opening a stranger's would run
his code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.core.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.folders import Place

_MARKS = (".metadata", "common.pt")
_WAY_ROUND = (
    "Have it written as a Hugging Face folder by the tools it came with (Megatron Bridge's "
    "AutoBridge export, or Megatron-LM's tools/checkpoint), and give that to --load or to "
    "tools/checkpoint/convert.py --from hf"
)


def refuse_foreign(folder: Place) -> None:
    """Refuse a folder that Megatron-LM wrote, or one of its checkpoints.

    Raises:
        CheckpointError: It is one; says what kind, and the way round.
    """
    for place in (folder, *_inside(folder)):
        kind = _kind(place)
        if kind:
            raise CheckpointError(
                f"{place} is a checkpoint of Megatron-LM ({kind}), which is not read here: it is "
                f"made of pickles, which may run any code when they are read. {_WAY_ROUND}"
            )


def _inside(folder: Place) -> list[Place]:
    if not folder.is_dir():
        return []
    named = [p for p in folder.iterdir() if p.name == "release" or p.name.startswith("iter_")]
    return sorted((place for place in named if place.is_dir()), key=lambda place: place.name)


def _kind(place: Place) -> str:
    if not place.is_dir() or (place / "manifest.json").is_file():
        return ""
    names = {entry.name for entry in place.iterdir()}
    if found := [name for name in _MARKS if name in names]:
        return f"torch_dist or zarr: it has {', '.join(found)}"
    legacy = sorted(name for name in names if name.startswith("mp_rank_"))
    return f"legacy: it has {legacy[0]}" if legacy else ""
