"""Errors that the user can mend, before the ranks are connected: told once, exit code 2."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.errors import MegatronError

EXIT_CODE = 2
OTHER_RANKS_WAIT_SECONDS = 2.0
"""torchrun ends all ranks when the first one exits; rank 0 must have told the user by then."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a MegatronError into one message on standard error and exit code 2.

    Every rank finds the same error in the same options: rank 0 tells, the others wait for it.
    """
    try:
        yield
    except MegatronError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            sys.stderr.write(f"{error}\n")
        else:
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        raise SystemExit(EXIT_CODE) from None
