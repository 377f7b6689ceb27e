"""How a run that fails ends: quickly, on every rank, with the first failure told once.

The first failing rank notes its error in the store of the launcher before its connections close;
the others find the note and add one line instead of a traceback of a broken connection. A rank
that is stuck in a collective is ended by a watching thread.
"""

import json
import logging
import os
import signal
import sys
import threading
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron.core.errors import MegatronError
from megatron.training.rendezvous import launcher_store
from megatron.training.user_errors import EXIT_CODE

log = logging.getLogger(__name__)

LOST = (
    "lost the connection to another rank, which ended without a word: it was killed, perhaps for "
    "lack of memory"
)
POLL_SECONDS = 1.0
GRACE_SECONDS = 4.0
"""How long a rank may take to notice by itself that another one failed."""
DYING_SECONDS = 8
"""How long a failing process may take to end; destructors of communicators can hang."""
ASKING_SECONDS = 5.0
"""How long the end of a run waits for the watching thread, which may be asking the store."""


class _Note(NamedTuple):
    """What the first failing rank leaves in the store."""

    rank: int
    place: str
    message: str


class FailureReport:
    """Context around a whole run. An exception that leaves it is reported by one rank only.

    Errors the user can mend become ``SystemExit(2)`` after one message without traceback; others
    pass on with a note that names rank, iteration and place.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.where = f"rank {self.rank}"
        """Place of this rank in the layout, for messages."""
        self.iteration: int | None = None
        """The step in progress; None before and after training."""
        self._key = "megatron/failure/"
        self._store = store
        self._done = threading.Event()
        self._watching: threading.Thread | None = None

    def __enter__(self) -> "FailureReport":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_watch()
        if error is None or not isinstance(error, Exception):
            return
        lost, message = _is_lost_connection(error), f"{type(error).__name__}: {error}"
        first = self._noted() if lost else self._note(message)
        if self._store is not None:
            _end_soon()
        if first is not None and first.message == message and isinstance(error, MegatronError):
            raise SystemExit(EXIT_CODE) from None  # all ranks found it; the first one tells it
        if first is not None:
            log.error("%s stops because %s failed: %s", self.where, first.place, first.message)
            raise SystemExit(1) from None
        if lost:
            reason = str(error).partition("\n")[0].partition(". This is typically")[0]
            log.error("%s: %s (%s)", self.place(), LOST, reason)
            raise SystemExit(1) from None
        error.add_note(f"First failure of the run: {self.place()}")
        get_error_handler().record_exception(error)  # torchrun shows it at its very end
        if isinstance(error, MegatronError):
            sys.stderr.write(f"{error}\n")
            raise SystemExit(EXIT_CODE) from None

    def watch(self, start: str = "") -> None:
        """Begin to end this process when another rank fails. Call after connecting.

        Args:
            start: Name of this start of all ranks: what ranks of an earlier one noted in the
                launcher's store is no failure of these.
        """
        self._key += start
        if self._store is None:
            self._store = _own_connection()
        if self._store is not None:
            self._watching = threading.Thread(target=self._watch, name="failure watch", daemon=True)
            self._watching.start()

    def place(self) -> str:
        """Name rank and step, such as ``rank 1 (dp 1, ep 1), iteration 7``."""
        step = "outside training" if self.iteration is None else f"iteration {self.iteration}"
        return f"{self.where}, {step}"

    def _note(self, message: str) -> _Note | None:
        """Note the failure of this rank; return another rank's note if that came first."""
        if self._store is None:
            return None
        mine = _Note(self.rank, self.place(), message)
        try:
            noted = _Note(*json.loads(self._store.compare_set(self._key, "", json.dumps(mine))))
        except dist.DistError:  # the launcher is gone: nobody can tell who was first
            return None
        return None if noted.rank == self.rank else noted

    def _noted(self) -> _Note | None:
        """Return the note of the rank that failed first, None without one."""
        try:
            if self._store is None or not self._store.check([self._key]):
                return None
            return _Note(*json.loads(self._store.get(self._key)))
        except dist.DistError:
            return None

    def _end_watch(self) -> None:
        """End the watching thread: one inside the store while Python ends aborts the process."""
        self._done.set()
        if self._watching is not None:
            self._watching.join(ASKING_SECONDS)

    def _watch(self) -> None:
        assert self._store is not None, "watching needs a store"
        while not self._done.wait(POLL_SECONDS):
            if self._store.check([self._key]):
                if not self._done.wait(GRACE_SECONDS):
                    log.error("%s ends: another rank failed", self.place())
                    os._exit(1)
                return


def _is_lost_connection(error: Exception) -> bool:
    """Tell whether a collective failed because another process is gone."""
    text = str(error)
    known = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "connectFullMesh failed",  # it ended while the ranks were meeting
    )
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in known)


def _end_soon() -> None:
    """Let the kernel end this process if it hangs on its way out."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(DYING_SECONDS)


def _own_connection() -> Store | None:
    """Connect to torchrun's store apart from the process groups, whose calls may block it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_ADDR" not in os.environ:
        return None
    return launcher_store(timedelta(seconds=20))
