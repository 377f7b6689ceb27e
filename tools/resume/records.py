"""What the ranks of a recorded run wrote, read back; a line that a kill cut short is left out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron.training.metrics import EXPERT_LOAD, read_lines
from tools.resume.record_names import LOADED, STEP, steps_file
from tools.resume.state_files import SavedState

Line = dict[str, Any]
_WORD = 1 << 64


class Record(NamedTuple):
    """A run, as its ranks wrote it down."""

    folder: Path
    loaded: list[Line]
    """Of each rank: where it stood before its first step."""
    steps: list[dict[int, Line]]
    """Of each rank: iteration -> line of the step."""
    tokens_per_expert: dict[int, list[list[int]]]
    """Iteration -> [MoE layers][experts], of all ranks; empty without MoE layers."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.steps)

    @property
    def iterations(self) -> list[int]:
        """Iterations that every rank has written, in order."""
        return sorted(set.intersection(*(set(steps) for steps in self.steps)))

    def standing(self, rank: int, iteration: int) -> Line:
        """Return where a rank stood after ``iteration``, its beginning included."""
        loaded = self.loaded[rank]
        return loaded if loaded["iteration"] == iteration else self.steps[rank][iteration]

    def state(self, name: str) -> SavedState:
        """Open the tensors that all ranks wrote into a folder."""
        return SavedState(self.folder / name)

    def samples(self, iteration: int) -> dict[int, int]:
        """Return sample -> fingerprint of all that the ranks read for a step, in order.

        Slices of a sequence (context parallelism) are added up; copies, which the ranks of other
        stages and of other slices of the model read, are left out.
        """
        found: dict[int, int] = {}
        for loaded, steps in zip(self.loaded, self.steps, strict=True):
            if loaded["tp"] == 0 and loaded["pp"] == 0:
                for sample, print_ in steps[iteration]["samples"]:
                    found[sample] = (found.get(sample, 0) + print_) % _WORD
        return dict(sorted(found.items()))


def read_record(folder: Path, world_size: int) -> Record:
    """Read what all ranks wrote."""
    lines = [list(_lines(folder / steps_file(rank))) for rank in range(world_size)]
    loaded = [next(line for line in of_rank if line["event"] == LOADED) for of_rank in lines]
    steps = [
        {line["iteration"]: line for line in of_rank if line["event"] == STEP} for of_rank in lines
    ]
    loads = {
        line["iteration"]: line["tokens_per_expert"] for line in read_lines(folder / EXPERT_LOAD)
    }
    return Record(folder, loaded, steps, loads)


def steps_done(folder: Path) -> int:
    """Return the last iteration that rank 0 has written; 0 before any."""
    last = 0
    for line in _lines(folder / steps_file(0)):
        last = line["iteration"] if line["event"] == STEP else last
    return last


def _lines(path: Path) -> Iterator[Line]:
    if path.exists():
        for text in path.read_text().splitlines(keepends=True):
            if text.endswith("\n"):
                yield json.loads(text)
