"""Where the time before the first step goes: one line of the log, from the launch of the process.

A process starts once, so there is one clock, ``start_clock``. Marks after its line do nothing.
Imports no torch: it runs while that is not yet loaded.
"""

import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)


class StartClock:
    """Seconds since the launch of this process, and what each of them went to."""

    def __init__(self, launched: float | None = None) -> None:
        """Begin at ``launched`` of ``time.monotonic``; when None, at the launch of the process."""
        self._last = _launch_time() if launched is None else launched
        self._phases: dict[str, float] = {}
        self._told = False

    def mark(self, phase: str) -> None:
        """Count what has passed since the last mark as ``phase``; a phase may come in parts."""
        if self._told:
            return
        now = time.monotonic()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def first_step_done(self) -> None:
        """Say once how long it took, and what for."""
        if self._told:
            return
        self.mark("first step")
        self._told = True
        log.info(" > %s", self.line())

    def line(self) -> str:
        """Return the marks as a sentence: the sum, then every phase that takes 5 ms or more."""
        phases = ", ".join(f"{name} {s:.2f}" for name, s in self._phases.items() if s >= 0.005)
        total = sum(self._phases.values())
        spent = (
            f"{total:.2f} s after the launch of this rank, {time.process_time():.2f} s of them on"
        )
        return f"first step done {spent} processors: {phases}"


def _launch_time() -> float:
    """Return ``time.monotonic`` at the launch of this process, to 10 ms; now where nobody says."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return time.monotonic()
    # proc(5): field 22, in clock ticks since boot; field 2, in brackets, may hold anything
    ticks = int(stat.rpartition(")")[2].split()[19])
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    return time.monotonic() - age


start_clock = StartClock()
