"""A process group of one rank, for benches that build real layers without torchrun."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


@contextmanager
def world_of_one() -> Iterator[None]:
    """Initialise torch.distributed for this process alone, and tear it down."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = f"file://{Path(folder) / 'store'}"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
