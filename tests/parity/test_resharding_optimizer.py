"""Moments and main weights fit any layout, shared out over data ranks or not."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.serialization import (
    read_tensors,
    stored_tensors,
    write_tensors,
)
from megatron.core.dist_checkpointing.tensor_shards import Storable
from megatron.core.distributed import bucket_layout
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import build, clear, fill, wrong_keys

LAYOUTS = [  # (world size, EP, ETP, sharded)
    (2, 1, 1, False),
    (1, 1, 1, True),
    (2, 1, 1, True),
    (4, 2, 1, True),
    (4, 1, 2, True),
    (3, 1, 1, True),
    (4, 1, 2, False),
]
PREFIXES = ("model.", "optimizer.")


def _tensors(ddp, optimizer) -> dict[str, Storable]:
    return model_tensors(ddp.module) | optimizer_tensors(optimizer.named_state())


def _save(folder: str, layout: tuple[int, int, bool], dtype: torch.dtype) -> None:
    ep, etp, sharded = layout
    tensors = _tensors(*build(ep, dtype, etp, sharded=sharded))
    fill(tensors)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def _load(sources: list[str], layout: tuple[int, int, bool], dtype: torch.dtype) -> None:
    ep, etp, sharded = layout
    ddp, optimizer = build(ep, dtype, etp, sharded=sharded)
    for source in sources:
        clear(_tensors(ddp, optimizer))
        read_tensors(Path(source), _tensors(ddp, optimizer), dist.group.WORLD, prefixes=PREFIXES)
        assert wrong_keys(_tensors(ddp, optimizer)) == [], f"saved at {Path(source).name}"


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_sharded_and_plain_state_load_each_other(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # slices end within rows of these tiny parameters
    monkeypatch.setattr(bucket_layout, "BUFFER_ALIGNMENT", 1)
    monkeypatch.setattr(bucket_layout, "PARAM_ALIGNMENT", 1)
    sources = [str(tmp_path / "_".join(map(str, layout))) for layout in LAYOUTS]
    for source, (world, *layout) in zip(sources, LAYOUTS, strict=True):
        run_ranks(_save, world, source, tuple(layout), dtype)
    for world, *layout in LAYOUTS:
        run_ranks(_load, world, sources, tuple(layout), dtype)
    stored = [stored_tensors(Path(source)) for source in sources]
    assert all(one == other for one, other in pairwise(stored))
