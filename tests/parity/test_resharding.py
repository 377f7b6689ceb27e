"""R10, R11: every expert under its global id, and any layout's checkpoint fits any other's."""

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
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import EXPERTS, build, fill, wrong_keys

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]  # (world size, EP)
PREFIXES = ("model.", "optimizer.")


def _tensors(ddp, optimizer) -> dict[str, torch.Tensor]:
    return model_tensors(ddp.module) | optimizer_tensors(optimizer.named_state())


def _save(folder: str, ep: int, dtype: torch.dtype) -> None:
    tensors = _tensors(*build(ep, dtype))
    fill(tensors)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def _load(sources: list[str], ep: int, dtype: torch.dtype) -> None:
    ddp, optimizer = build(ep, dtype)
    for source in sources:
        for tensor in _tensors(ddp, optimizer).values():
            tensor.zero_()
        read_tensors(Path(source), _tensors(ddp, optimizer), dist.group.WORLD, prefixes=PREFIXES)
        assert wrong_keys(_tensors(ddp, optimizer)) == [], f"saved at {Path(source).name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_loads_what_every_layout_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    sources = [str(tmp_path / f"world{world}_ep{ep}") for world, ep in LAYOUTS]
    for source, (world, ep) in zip(sources, LAYOUTS, strict=True):
        run_ranks(_save, world, source, ep, dtype)
    for world, ep in LAYOUTS:
        run_ranks(_load, world, sources, ep, dtype)
    stored = [stored_tensors(Path(source)) for source in sources]
    assert all(one == other for one, other in pairwise(stored))
    states = 3 if dtype == torch.float32 else 4  # weight, two moments, bf16: fp32 main weight
    assert len([key for key in stored[0] if ".local_experts." in key]) == states * EXPERTS
