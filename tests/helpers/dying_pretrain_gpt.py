"""``pretrain_gpt.py`` whose ranks SIGKILL themselves as planned; started by `dying_runs.py`."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pretrain_gpt
from tests.helpers.dying_runs import PAUSE, Death, planned


def dying(function: Callable[..., Any], death: Death) -> Callable[..., Any]:
    """Return ``function``, whose ``death.call``-th call is the last thing this process does."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == death.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def slow(function: Callable[..., Any], pause_s: float) -> Callable[..., Any]:
    """Return ``function`` with a pause before each call."""

    def paused(*args: Any, **kwargs: Any) -> Any:
        time.sleep(pause_s)
        return function(*args, **kwargs)

    return paused


def main() -> None:
    if PAUSE in os.environ:
        pretrain_gpt.forward_step = slow(pretrain_gpt.forward_step, float(os.environ[PAUSE]))
    for death in planned(os.environ):
        if death.moment == "microbatch":
            pretrain_gpt.forward_step = dying(pretrain_gpt.forward_step, death)
        else:
            setattr(os, death.moment, dying(getattr(os, death.moment), death))
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
