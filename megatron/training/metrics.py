"""Where figures of a run are kept: JSON lines in the log folder, and TensorBoard. Rank 0 only.

Three files, one JSON object a line, each with its ``iteration``: ``metrics.jsonl`` (every step),
``evaluation.jsonl`` (every evaluation) and ``expert_load.jsonl`` (every log interval). A resumed
run goes on in them, after dropping lines beyond the step it resumed from.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron.training.config.logging import LoggingConfig

log = logging.getLogger(__name__)

STEPS = "metrics.jsonl"
EVALUATIONS = "evaluation.jsonl"
EXPERT_LOAD = "expert_load.jsonl"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; lines cut short by a crash or a full disk are left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


class JsonLines:
    """Appends objects to one file, each on disk (in the page cache) when ``write`` returns."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Open ``path`` to go on after ``iteration``.

        A fresh run (iteration 0) does not overwrite the file of an earlier one: that is renamed
        to ``<name>.previous``.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if iteration == 0:
                path.replace(path.with_name(path.name + ".previous"))
            else:
                _truncate(path, iteration)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite become null."""
        plain = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _truncate(path: Path, iteration: int) -> None:
    kept = [json.dumps(line) for line in read_lines(path) if line["iteration"] <= iteration]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """The files and the TensorBoard of one run. Without a folder, writing does nothing.

    What cannot be written, on a full disk say, is warned of once and then left out: training is
    worth more than its log.
    """

    def __init__(self, config: LoggingConfig, folder: Path | None, iteration: int) -> None:
        self.folder = folder
        self._files: dict[str, JsonLines] = {}
        if folder is not None:
            for name in (STEPS, EVALUATIONS, EXPERT_LOAD):
                self._files[name] = JsonLines(folder / name, iteration)
        self._every = config.tensorboard_log_interval
        self._board: Any = None
        if config.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                config.tensorboard_dir,
                max_queue=config.tensorboard_queue_size,
                purge_step=iteration + 1 if iteration else None,
            )

    def line(self, name: str, values: Mapping[str, Any]) -> None:
        """Append ``values`` to the file ``name``."""
        file = self._files.get(name)
        if file is not None and not _written(name, partial(file.write, values)):
            with suppress(OSError):  # closing tries to write what is left
                self._files.pop(name).close()

    def scalars(self, iteration: int, values: Mapping[str, float], *, always: bool = False) -> None:
        """Send scalars to TensorBoard, at --tensorboard-log-interval unless ``always``."""
        if self._board is not None and (always or iteration % self._every == 0):
            for name, value in values.items():
                add = partial(self._board.add_scalar, name, value, iteration)
                if not _written("TensorBoard", add):
                    self._board = None
                    return

    def close(self) -> None:
        """Write what is held back and close everything."""
        for name, file in self._files.items():
            _written(name, file.close)
        if self._board is not None:
            _written("TensorBoard", self._board.close)


def _written(name: str, write: Callable[[], None]) -> bool:
    """Call ``write``; on an error of the disk warn and return False."""
    try:
        write()
    except OSError as error:
        log.warning("%s cannot be written any more (%s): training goes on without it", name, error)
        return False
    return True


def log_folder(config: LoggingConfig, save: str | None) -> Path | None:
    """Return the folder of the files: --log-dir, else --save, else none."""
    folder = config.log_dir or save
    return Path(folder) if folder else None
