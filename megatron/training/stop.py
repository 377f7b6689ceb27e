"""When a run ends before its last iteration: signals, a time limit, --exit-interval.

A signal reaches one rank or all, at any moment; nothing is done in the handler but noting it. The
notes travel with the sum of losses that every step makes anyway, so all ranks stop at the same
step.
"""

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

from megatron.training.config.training import TrainingConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 1.0
"""Two signals closer than this are one: Ctrl-C reaches a rank from the terminal and torchrun."""


class StopReason(NamedTuple):
    """Why all ranks stop before the last iteration."""

    text: str
    """For the log."""
    hurry: bool
    """Only the state is saved; what else would be due, an evaluation say, is left out."""


class StopRequest:
    """Collects this rank's reasons to stop. A context: signals are watched inside it.

    SIGTERM and SIGINT ask for a stop at the end of the step. A second SIGINT interrupts at once; a
    second SIGTERM changes nothing, because launchers pass on what the whole process group got.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._exit_interval = config.exit_interval
        self._limit_s = 60.0 * (config.exit_duration_in_mins or 0)
        self._began = time.monotonic()
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self._received is not None and time.monotonic() - self._received_at > ECHO_SECONDS
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), time.monotonic()

    def notes(self) -> tuple[float, float]:
        """Return this rank's (signal, time limit) as 0 or 1, to be summed over all ranks."""
        overdue = self._limit_s > 0 and time.monotonic() - self._began > self._limit_s
        return float(self._received is not None), float(overdue)

    def reason(self, agreed_notes: Sequence[float], iteration: int) -> StopReason | None:
        """Say why all ranks stop after ``iteration``, or None to go on.

        Args:
            agreed_notes: ``notes()`` summed over all ranks, so that each rank decides alike.
            iteration: The step just done.
        """
        signals, overdue = agreed_notes
        if signals:
            name = self._received.name if self._received else "a peer"
            return StopReason(f"a termination signal ({name})", hurry=True)
        if overdue:
            return StopReason(f"--exit-duration-in-mins {self._limit_s / 60:g}", hurry=True)
        if self._exit_interval and iteration % self._exit_interval == 0:
            return StopReason(f"--exit-interval {self._exit_interval}", hurry=False)
        return None
