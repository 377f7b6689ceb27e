"""How far a long read is: a bar on a terminal, plain lines elsewhere. Writes to stderr."""

import sys
import time
from datetime import timedelta
from typing import Any

MEGABYTE = 1e6
SECONDS_BETWEEN_LINES = 1.0


class Progress:
    """Counts documents and bytes.

    Args:
        total_bytes: Size of all input files on disk.
        log_interval: Documents between two lines; never more than a line a second.
    """

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self.documents = 0
        self.num_bytes = 0
        self._total = total_bytes
        self._interval = log_interval
        self._position = 0
        self._start = time.monotonic()
        self._last_line = self._start
        self._next_document = log_interval
        self._bar = _bar(total_bytes) if sys.stderr.isatty() else None

    def update(self, *, documents: int, num_bytes: int, position: int) -> None:
        """Note ``documents`` and ``num_bytes`` more; ``position`` of all bytes on disk are read."""
        self.documents += documents
        self.num_bytes += num_bytes
        if self._bar is not None:
            self._bar.update(position - self._position)
            self._bar.set_postfix_str(self.rates(), refresh=False)
        self._position = position
        if self._bar is None:
            self._maybe_line()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return max(time.monotonic() - self._start, 1e-9)

    def rates(self) -> str:
        """Documents and megabytes (of text as read) per second."""
        per_second = self.documents / self.seconds
        return f"{per_second:.1f} docs/s, {self.num_bytes / MEGABYTE / self.seconds:.2f} MB/s"

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()

    def _maybe_line(self) -> None:
        now = time.monotonic()
        if self.documents < self._next_document or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        self._next_document = self.documents + self._interval
        done = self._position / max(self._total, 1)
        left = timedelta(seconds=round(self.seconds * (1 - done) / max(done, 1e-9)))
        line = f"Processed {self.documents} documents ({self.rates()}). {done:.1%} done, ETA {left}"
        print(line, file=sys.stderr, flush=True)


def _bar(total_bytes: int) -> Any:
    """Return a tqdm bar; None without tqdm, which turns plain lines on."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    tqdm.monitor_interval = 0  # no thread before the workers are forked
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc="reading", mininterval=0.2)
