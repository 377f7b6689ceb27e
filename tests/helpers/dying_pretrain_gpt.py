"""``pretrain_gpt.py`` whose ranks SIGKILL themselves as planned; started by `dying_runs.py`."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pretrain_gpt
from tests.helpers.dying_runs import Death, planned


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


def main() -> None:
    for death in planned(os.environ):
        if death.moment == "microbatch":
            pretrain_gpt.forward_step = dying(pretrain_gpt.forward_step, death)
        else:
            setattr(os, death.moment, dying(getattr(os, death.moment), death))
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
