"""Named wall-clock timers, as Megatron's ``get_timers()``. They never synchronise a device."""

import time


class Timer:
    """A stopwatch that adds up the stretches between ``start`` and ``stop``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._total = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin a stretch; a running timer is a bug of the caller."""
        assert self._started is None, f"timer {self.name} was started twice"
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End the stretch and add it to the total."""
        assert self._started is not None, f"timer {self.name} was not started"
        self._total += time.perf_counter() - self._started
        self._started = None

    def elapsed(self, reset: bool = True) -> float:
        """Return the total in seconds, the running stretch included.

        Args:
            reset: Begin again at zero; a running stretch goes on from now.
        """
        now = time.perf_counter()
        total = self._total + (now - self._started if self._started is not None else 0.0)
        if reset:
            self._total = 0.0
            if self._started is not None:
                self._started = now
        return total


class Timers:
    """Timers by name, made when first asked for: ``timers("forward").start()``."""

    def __init__(self) -> None:
        self._timers: dict[str, Timer] = {}

    def __call__(self, name: str, log_level: int = 0) -> Timer:
        """Return the timer called ``name``.

        Args:
            name: Any text.
            log_level: Accepted for Megatron scripts; every timer is kept.
        """
        return self._timers.setdefault(name, Timer(name))
