"""A progress bar on rank 0's terminal; nothing elsewhere, where the log lines say it all."""

import sys
from typing import Any

from megatron.core.log import RankHandler


class Progress:
    """Counts steps on a terminal, if tqdm is installed. A context: it closes the bar."""

    def __init__(self, handler: RankHandler | None, *, done: int, total: int, show: bool) -> None:
        """Prepare a bar.

        Args:
            handler: Its lines are then written above the bar.
            done: Steps made before this run.
            total: Steps of the whole run.
            show: Whether this rank shows anything (it is rank 0).
        """
        self._bar: Any = None
        self._handler = handler
        if not (show and sys.stderr.isatty()):
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(initial=done, total=total, unit="step", dynamic_ncols=True)
        if handler is not None:
            self._write_line = handler.write_line
            handler.write_line = lambda line: tqdm.write(line, file=sys.stdout)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
            if self._handler is not None:
                self._handler.write_line = self._write_line

    def update(self, loss: float) -> None:
        """Count one step and show its loss."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update()
