"""How the ranks of one start find each other in a store that outlives starts.

torchrun keeps one store for all of its restarts. What ranks wrote into it before a restart,
addresses of processes that are gone among it, would be read as of now, and the restart count does
not tell starts apart: it stays when nodes come or go, and each node counts for itself.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron.core.errors import ConfigError

_HELLO = "megatron/hello"
_START = "megatron/start"
_LOOK_SECONDS = 0.02
_SHOWN = 8


def launcher_keeps_store() -> bool:
    """Tell whether MASTER_ADDR names a store of torchrun's, which rank 0 need not open."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher_store(timeout: timedelta) -> Store:
    """Connect to the store of torchrun."""
    return dist.TCPStore(  # type: ignore[attr-defined, no-any-return]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )


def store_of_start(store: Store, start: str) -> Store:
    """Return the part of ``store`` that belongs to one start."""
    return PrefixStore(f"{_START}/{start}", store)


def agree_on_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name for this start of all ranks: the same on each, and never used before.

    Every rank leaves a word that nobody used before; rank 0 answers each word with the name, anew
    when a rank replaces the word of its predecessor, until all have said that they heard it.

    Args:
        store: Shared by the ranks; may hold what those of earlier starts left.
        rank: This one.
        world_size: How many there are.
        timeout: How long to wait for the others.

    Raises:
        ConfigError: Some rank did not come in time.
    """
    if rank == 0:
        return _call_together(store, world_size, timeout)
    word = uuid.uuid4().hex
    store.set(f"{_HELLO}/{rank}", word)
    try:
        store.wait([f"{_START}/answer/{word}"], timeout)
    except dist.DistStoreError as error:
        raise ConfigError(_absent([0], timeout)) from error
    start = store.get(f"{_START}/answer/{word}").decode()
    store.add(f"{_START}/{start}/heard", 1)
    return start


def _call_together(store: Store, world_size: int, timeout: timedelta) -> str:
    start = uuid.uuid4().hex
    others = {rank: f"{_HELLO}/{rank}" for rank in range(1, world_size)}
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store.wait(list(others.values()), timeout)
    except dist.DistStoreError as error:
        absent = [rank for rank, key in others.items() if not store.check([key])]
        raise ConfigError(_absent(absent, timeout)) from error
    answered: dict[int, bytes] = {}
    while store.add(f"{_START}/{start}/heard", 0) < len(others):
        words = dict(zip(others, store.multi_get(list(others.values())), strict=True))
        for rank, word in words.items():
            if answered.get(rank) != word:
                store.set(f"{_START}/answer/{word.decode()}", start)
        answered = words
        if time.monotonic() > deadline:
            heard = store.add(f"{_START}/{start}/heard", 0)
            raise ConfigError(
                f"only {heard + 1} of {world_size} ranks came {_within(timeout)}: look for the "
                "others in their logs"
            )
        time.sleep(_LOOK_SECONDS)
    return start


def _absent(ranks: list[int], timeout: timedelta) -> str:
    named = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if ranks[_SHOWN:] else "")
    who = f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
    return f"{who} did not come {_within(timeout)}: look into the log of that machine"


def _within(timeout: timedelta) -> str:
    return f"within --distributed-timeout-minutes {timeout.total_seconds() / 60:g}"
