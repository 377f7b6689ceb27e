"""The files of a routing trace: which experts each token chose, and with what weights. numpy only.

    FOLDER/start_0001_from_00000000/index.json              one folder for each start of the run
    FOLDER/start_0001_from_00000000/rank_00000/step_00000001.npz

Every rank writes the samples that it computed, under their global numbers. A later start replaces
the steps after the one it began from, as a resumed run replaces them; no file is ever changed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.core.errors import DataError

FORMAT = 1
INDEX = "index.json"
_START = re.compile(r"start_(\d{4,})_from_(\d{8,})")
_STEP = re.compile(r"step_(\d{8,})\.npz")


@dataclass(frozen=True, kw_only=True)
class TraceIndex:
    """What one start of a run says of its trace."""

    first_step: int
    """Steps made before it."""
    world_size: int
    """Ranks, each with a folder of its own."""
    moe_layers: list[int]
    """Global indices of the MoE layers."""
    num_experts: list[int]
    """Of each of them."""
    topk: list[int]
    """Columns of each of them: the most experts that a token may have."""
    format: int = FORMAT


class StepTrace(NamedTuple):
    """One step, or a rank's part of it; rows are samples."""

    sample_ids: NDArray[np.int64]
    """[samples]: numbers in the global order; dropout and data order go by them too."""
    tokens: NDArray[Any]
    """[samples, s]: token ids, uint16 or int32; the position in the sample is the column."""
    padding: NDArray[np.bool_]
    """[samples, s]: True where a token is padding."""
    experts: Mapping[int, NDArray[Any]]
    """MoE layer -> [samples, s, topk] expert ids by falling weight, uint8 or uint16; the largest
    number of the dtype where a token has fewer experts."""
    weights: Mapping[int, NDArray[np.float16]]
    """MoE layer -> [samples, s, topk], of the same experts; 0 where a capacity dropped the
    token."""


def id_dtype(num_experts: int) -> np.dtype[Any]:
    """Return the smallest dtype for ids below ``num_experts`` and one more, for no expert."""
    return np.dtype(np.uint8 if num_experts <= 255 else np.uint16)


def no_expert(dtype: np.dtype[Any]) -> int:
    """Return the id that stands for no expert."""
    return int(np.iinfo(dtype).max)


def start_name(number: int, first_step: int) -> str:
    """Return the folder of a start; ``number`` counts starts from 1."""
    return f"start_{number:04d}_from_{first_step:08d}"


def next_start(folder: Path, first_step: int) -> str:
    """Return a name for a start that comes after all that are in ``folder``."""
    return start_name(max((number for number, _, _ in _starts(folder)), default=0) + 1, first_step)


def write_index(start: Path, index: TraceIndex) -> None:
    """Write ``index`` to the folder of a start, which need not exist."""
    start.mkdir(parents=True, exist_ok=True)
    (start / INDEX).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8")


def rank_folder(start: Path, rank: int) -> Path:
    """Return where ``rank`` writes."""
    return start / f"rank_{rank:05d}"


def write_step(folder: Path, step: int, trace: StepTrace) -> int:
    """Write a rank's part of ``step``; return the bytes of the file, which is there when whole."""
    arrays: dict[str, NDArray[Any]] = {"sample_ids": trace.sample_ids, "tokens": trace.tokens}
    if trace.padding.any():
        arrays["padding"] = trace.padding
    for layer, ids in trace.experts.items():
        arrays[f"experts_{layer}"] = ids
        arrays[f"weights_{layer}"] = trace.weights[layer]
    path = folder / f"step_{step:08d}.npz"
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)
    return path.stat().st_size


class RoutingTrace:
    """Reads what all ranks and starts of a run wrote to one folder."""

    def __init__(self, folder: str | Path) -> None:
        """Look what is there.

        Raises:
            DataError: There is no trace, or one of a format that this version does not know.
        """
        self.folder = Path(folder)
        self._files: dict[int, list[Path]] = {}
        """Step -> file of each rank."""
        self.index: TraceIndex
        """Of the latest start."""
        starts = _starts(self.folder)
        for _, first_step, path in starts:
            self.index = _read_index(path)
            self._files = {s: files for s, files in self._files.items() if s <= first_step}
            for file in sorted(path.glob("rank_*/step_*.npz")):
                found = _STEP.fullmatch(file.name)
                assert found is not None, f"the pattern of the search names steps: {file}"
                self._files.setdefault(int(found[1]), []).append(file)
        if not starts:
            raise DataError(f"{self.folder} holds no routing trace (no folder start_*_from_*)")

    @property
    def steps(self) -> list[int]:
        """Steps that were traced, in order."""
        return sorted(self._files)

    @property
    def moe_layers(self) -> list[int]:
        """Global indices of the MoE layers."""
        return self.index.moe_layers

    def num_experts(self, layer: int) -> int:
        """Return the experts of MoE layer ``layer``."""
        return self.index.num_experts[self.index.moe_layers.index(layer)]

    def read(self, step: int) -> StepTrace:
        """Return ``step`` of all ranks, ordered by sample."""
        parts = [_read_part(path) for path in self._files[step]]
        order = np.argsort(np.concatenate([part.sample_ids for part in parts]), kind="stable")
        layers = list(parts[0].experts)
        return StepTrace(
            sample_ids=np.concatenate([part.sample_ids for part in parts])[order],
            tokens=np.concatenate([part.tokens for part in parts])[order],
            padding=np.concatenate([part.padding for part in parts])[order],
            experts={
                layer: np.concatenate([part.experts[layer] for part in parts])[order]
                for layer in layers
            },
            weights={
                layer: np.concatenate([part.weights[layer] for part in parts])[order]
                for layer in layers
            },
        )

    def bytes_of(self, rank: int) -> int:
        """Return the size of all files of ``rank`` that count."""
        name = rank_folder(Path(), rank).name
        return sum(
            path.stat().st_size
            for files in self._files.values()
            for path in files
            if path.parent.name == name
        )


def _starts(folder: Path) -> list[tuple[int, int, Path]]:
    """Return (number, first step, folder) of each start, in order."""
    found = []
    for path in folder.glob("start_*_from_*"):
        if match := _START.fullmatch(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def _read_index(start: Path) -> TraceIndex:
    try:
        values = json.loads((start / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{start / INDEX} cannot be read: {error}") from error
    if values.get("format") != FORMAT:
        raise DataError(
            f"{start / INDEX} has format {values.get('format')}; this version reads {FORMAT}"
        )
    return TraceIndex(**values)


def _read_part(path: Path) -> StepTrace:
    with np.load(path) as file:
        arrays = dict(file)
    tokens = arrays["tokens"]
    layers = sorted(int(name.partition("_")[2]) for name in arrays if name.startswith("experts_"))
    return StepTrace(
        sample_ids=arrays["sample_ids"],
        tokens=tokens,
        padding=arrays.get("padding", np.zeros(tokens.shape, dtype=np.bool_)),
        experts={layer: arrays[f"experts_{layer}"] for layer in layers},
        weights={layer: arrays[f"weights_{layer}"] for layer in layers},
    )
