"""R11 over stages: what any split of the layers saves, any other loads: weights and moments."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.serialization import (
    read_tensors,
    stored_tensors,
    write_tensors,
)
from megatron.core.dist_checkpointing.tensor_shards import Storable
from megatron.training.run import Run
from tests.helpers.layouts import make_config, make_run
from tests.helpers.ranks import run_ranks
from tests.parity.test_pipeline import EP, SP, TWICE, UNTIED, pipe
from tests.unit_tests.core.dist_checkpointing.stand_in import clear, fill, wrong_keys

SHARDED = {"use_distributed_optimizer": True}
MODEL = {"num_layers": 4, "moe_layer_freq": [0, 1, 0, 1], "fp64": False, "bf16": True}
Layout = tuple[int, dict[str, Any]]
QUICK: list[Layout] = [(1, {}), (2, pipe(2, **TWICE, **SHARDED))]
LAYOUTS: list[Layout] = [
    *QUICK,
    (2, pipe(2)),
    (2, pipe(2, **TWICE)),
    (4, pipe(2, **EP, **SHARDED)),
    (2, pipe(2, **SHARDED)),
    (4, pipe(4, "E|ttt||tL")),
    (4, pipe(4, **SHARDED)),
    (4, pipe(2, **SP)),
    (4, SP | SHARDED),
]
PREFIXES = ("model.", "optimizer.")


def _tensors(run: Run) -> dict[str, Storable]:
    return model_tensors(run.model.module) | optimizer_tensors(run.optimizer.named_state())


def _run(options: dict[str, Any]) -> Run:
    return make_run(make_config(**(MODEL | {"optimizer": "adam"} | options)))


def _save(folder: str, options: dict[str, Any]) -> None:
    tensors = _tensors(_run(options))
    fill(tensors)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def _load(sources: list[str], options: dict[str, Any]) -> None:
    run = _run(options)
    for source in sources:
        clear(_tensors(run))
        read_tensors(Path(source), _tensors(run), dist.group.WORLD, prefixes=PREFIXES)
        assert wrong_keys(_tensors(run)) == [], f"saved at {Path(source).name}"


@pytest.mark.parametrize(
    ("layouts", "more"),
    [
        (QUICK, {}),
        (QUICK, UNTIED | {"mtp_num_layers": 2}),
        pytest.param(LAYOUTS[:2] + LAYOUTS[4:6], {"mtp_num_layers": 1}, marks=pytest.mark.slow),
        pytest.param(LAYOUTS, {}, marks=pytest.mark.slow),
        pytest.param(LAYOUTS, UNTIED, marks=pytest.mark.slow),
    ],
    ids=["quick", "two depths", "a depth, tied", "tied", "untied"],
)
def test_every_split_loads_what_every_split_saved(
    tmp_path: Path, layouts: list[Layout], more: dict[str, Any]
) -> None:
    sources = [str(tmp_path / str(number)) for number in range(len(layouts))]
    for source, (world, options) in zip(sources, layouts, strict=True):
        run_ranks(_save, world, source, options | more)
    for world, options in layouts:
        run_ranks(_load, world, sources, options | more)
    stored = [stored_tensors(Path(source)) for source in sources]
    assert all(one == other for one, other in pairwise(stored))
