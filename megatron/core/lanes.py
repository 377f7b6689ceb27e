"""Two pieces of work that take turns: while one waits for the network, the other computes.

Each runs in a thread of its own, but only the one that has the baton runs at all, so nothing is
ever done at the same time and results are those of one after the other. Knows no tensors and no
groups. Easy to break: a baton may change hands only where the program says so, never where time or
data does, or ranks issue their collectives in different orders and hang.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch

FirstT = TypeVar("FirstT")
SecondT = TypeVar("SecondT")


class LaneStopped(BaseException):
    """Raised in a lane whose companion failed; ``run_pair`` raises the companion's error.

    No ``Exception``, so that no handler of errors takes it for one of its own.
    """


class Lanes:
    """Runs the forward of one microbatch and the backward of another by turns.

    One object for a whole run. Who has launched a collective calls ``change`` before waiting for
    it. Outside ``run_pair``, or when the other lane has ended, ``change`` does nothing. It needs
    not know which lane it is called from: code runs only in the lane that has the baton, also
    where autograd runs it in a thread of its own (on CUDA).

    Law: the order in which two lanes go through their calls of ``change`` is a function of how many
    calls each makes. Ranks that run the same program thus issue the same collectives in one order.
    """

    def __init__(self) -> None:
        """Begin with nothing under way."""
        self._pair: _Pair[Any, Any] | None = None

    def run_pair(
        self, forward: Callable[[], FirstT], backward: Callable[[], SecondT]
    ) -> tuple[FirstT, SecondT]:
        """Run both, ``backward`` first until it changes; return what they return.

        A backward soon has rows to send, and a forward computes attention before: begun so, each
        has the other's computation to hide behind, from the first rows to the last. ``forward``
        runs in the calling thread; ``backward`` in one that ends before this returns and has the
        caller's context variables, grad mode, autocast, device and stream.

        Raises:
            BaseException: What the first of them to fail raised, with its traceback. The other has
                then ended, too, at its next ``change``.
        """
        assert self._pair is None, "a lane cannot have lanes of its own"
        self._pair = pair = _Pair(forward, backward)
        try:
            return pair.run()
        finally:
            self._pair = None

    def change(self) -> None:
        """Let the other lane run until it changes or ends."""
        if self._pair is not None:
            self._pair.change()


class _Pair(Generic[FirstT, SecondT]):
    """Two lanes, 0 and 1, and the baton: the number of the one that runs."""

    def __init__(self, first: Callable[[], FirstT], second: Callable[[], SecondT]) -> None:
        self._works: tuple[Callable[[], Any], Callable[[], Any]] = (first, second)
        self._turns = (threading.Semaphore(0), threading.Semaphore(0))
        self._second_left = threading.Event()
        self._running = 1
        self._is_over = [False, False]
        self._results: list[Any] = [None, None]
        self._errors: list[BaseException] = []

    def run(self) -> tuple[FirstT, SecondT]:
        """Run lane 0 here and lane 1 beside it, to the end of both."""
        state, variables = _thread_state(), contextvars.copy_context()
        other = threading.Thread(
            target=variables.run, args=(self._walk, 1, state), name="lane", daemon=True
        )
        try:
            other.start()
            self._turns[1].release()
            self._walk(0, None)
            self._second_left.wait()  # not join: interrupted, it takes the thread for ended
        except BaseException as error:  # noqa: BLE001  an interrupt; the other lane ends soon
            self._errors.append(error)
            self._leave(0)
            if other.ident is not None:
                self._second_left.wait()
        if other.ident is not None:
            other.join()
        if self._errors:
            raise self._errors[0]
        return self._results[0], self._results[1]

    def change(self) -> None:
        """See ``Lanes.change``."""
        mine, other = self._running, 1 - self._running
        if not self._errors and not self._is_over[other]:
            self._running = other
            self._turns[other].release()
            self._turns[mine].acquire()
        if self._errors:
            raise LaneStopped

    def _walk(self, lane: int, state: "_ThreadState | None") -> None:
        """Do the work of ``lane`` from its first turn on, and leave the baton to the other."""
        try:
            self._turns[lane].acquire()
            with _applied(state):
                if not self._errors:
                    self._results[lane] = self._works[lane]()
        except LaneStopped:
            assert self._errors, "a lane is stopped by an error of the other"
        except BaseException as error:  # noqa: BLE001  for the caller of run, whatever it is
            self._errors.append(error)
        finally:
            self._leave(lane)

    def _leave(self, lane: int) -> None:
        """Give the baton away for good."""
        self._is_over[lane] = True
        self._running = 1 - lane
        self._turns[1 - lane].release()
        if lane == 1:
            self._second_left.set()


class _ThreadState(NamedTuple):
    """What torch keeps for each thread, and a new thread has not."""

    has_grad: bool
    autocasts: list[tuple[str, torch.dtype]]
    """Devices on which autocast is on, and to what."""
    caches: bool
    """Whether autocast keeps what it has cast."""
    device: torch.device | None
    """On which tensors are made, None for the CPU."""
    stream: torch.cuda.Stream | None
    """Current one of the current CUDA device, None where CUDA is not in use."""


def _thread_state() -> _ThreadState:
    """Return the state of this thread."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    device = torch.get_default_device()
    return _ThreadState(
        has_grad=torch.is_grad_enabled(),
        autocasts=[(kind, torch.get_autocast_dtype(kind)) for kind in kinds],
        caches=torch.is_autocast_cache_enabled(),
        device=None if device.type == "cpu" else device,
        stream=torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
    )


@contextmanager
def _applied(state: _ThreadState | None) -> Iterator[None]:
    """Give this thread ``state`` for a while; None leaves it as it is."""
    with ExitStack() as stack:
        if state is not None:
            stack.enter_context(torch.set_grad_enabled(state.has_grad))
            for kind, dtype in state.autocasts:
                cast = torch.autocast(kind, dtype=dtype, cache_enabled=state.caches)
                stack.enter_context(cast)
            if state.device is not None:
                stack.enter_context(state.device)
            if state.stream is not None:
                torch.cuda.set_device(state.stream.device)
                stack.enter_context(torch.cuda.stream(state.stream))
        yield
