"""Run a function on several forked ranks of this machine, over gloo, on CPU."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.multiprocessing as mp

# The first assert_close imports sympy (~500 modules), the first optimizer of torch.optim
# torch._dynamo (~200); the two above come with the first checkpoint and the first sharded model.
# Done here, once, before the fork: otherwise every rank of every test pays seconds for it.
torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
torch.optim.AdamW([torch.zeros(1)])


def run_ranks(
    body: Callable[..., None], world_size: int, *args: object, backend: str = "gloo"
) -> None:
    """Call ``body(*args)`` on ``world_size`` forked ranks; a failing rank raises here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _entry,
            args=(world_size, Path(folder) / "store", body, args, backend),
            nprocs=world_size,
            start_method="fork",
        )


def _entry(
    rank: int,
    world_size: int,
    store: Path,
    body: Callable[..., None],
    args: tuple,
    backend: str,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        body(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
