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
from megatron.core.dist_checkpointing.tensor_shards import Storable
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from tests.helpers.models import MAX_LENGTH, VOCAB, tiny_config
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import (
    EXPERTS,
    build,
    clear,
    fill,
    wrong_keys,
)

LAYOUTS = [  # (world size, EP, ETP)
    (1, 1, 1),
    (2, 1, 1),
    (2, 2, 1),
    (2, 1, 2),
    (4, 1, 1),
    (4, 2, 1),
    (4, 2, 2),
    (4, 1, 4),
    (4, 1, 2),
]
PREFIXES = ("model.", "optimizer.")


def _tensors(ddp, optimizer) -> dict[str, Storable]:
    return model_tensors(ddp.module) | optimizer_tensors(optimizer.named_state())


def _save(folder: str, ep: int, etp: int, dtype: torch.dtype) -> None:
    tensors = _tensors(*build(ep, dtype, etp))
    fill(tensors)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def _load(sources: list[str], ep: int, etp: int, dtype: torch.dtype) -> None:
    ddp, optimizer = build(ep, dtype, etp)
    for source in sources:
        clear(_tensors(ddp, optimizer))
        read_tensors(Path(source), _tensors(ddp, optimizer), dist.group.WORLD, prefixes=PREFIXES)
        assert wrong_keys(_tensors(ddp, optimizer)) == [], f"saved at {Path(source).name}"


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_every_layout_loads_what_every_layout_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    sources = [str(tmp_path / "_".join(map(str, layout))) for layout in LAYOUTS]
    for source, (world, ep, etp) in zip(sources, LAYOUTS, strict=True):
        run_ranks(_save, world, source, ep, etp, dtype)
    for world, ep, etp in LAYOUTS:
        run_ranks(_load, world, sources, ep, etp, dtype)
    stored = [stored_tensors(Path(source)) for source in sources]
    assert all(one == other for one, other in pairwise(stored))
    states = 3 if dtype == torch.float32 else 4  # weight, two moments, bf16: fp32 main weight
    assert len([key for key in stored[0] if ".local_experts." in key]) == 2 * states * EXPERTS


HALVES = [f"model.experts.local_experts.0.linear_fc1.{half}.weight" for half in ("gate", "up")]


def _swapped_halves(folder: str) -> None:
    tensors = _tensors(*build(1, torch.float32, 2))
    fill(tensors)
    gate, up = HALVES
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def _both_are_wrong(folder: str) -> None:
    tensors = _tensors(*build(1, torch.float32))
    read_tensors(Path(folder), tensors, dist.group.WORLD, prefixes=PREFIXES)
    assert wrong_keys(tensors) == HALVES


def test_gate_and_up_that_changed_places_are_seen(tmp_path: Path) -> None:
    run_ranks(_swapped_halves, 2, str(tmp_path))
    run_ranks(_both_are_wrong, 1, str(tmp_path))


def _model(ep: int, kind: str, etp: int) -> GPTModel:
    config = tiny_config(
        num_moe_experts=4,
        moe_experts_type=kind,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        swiglu=True,
        moe_shared_expert_intermediate_size=6,
        moe_shared_expert_gate=True,
        moe_latent_size=6,
    )
    layout = config.layout(dist.get_world_size())
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config),
        vocab_size=VOCAB,
        max_sequence_length=MAX_LENGTH,
        pg_collection=ProcessGroupCollection.create(layout),
    )


def _save_model(folder: str, kind: str, etp: int) -> None:
    model = _model(dist.get_world_size() // etp, kind, etp)
    init_weights(model, 7)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)  # no longer what is drawn
    write_tensors(Path(folder), model_tensors(model), dist.group.WORLD)


def _load_model(folder: str, kind: str, etp: int) -> None:
    expected, model = (_model(dist.get_world_size() // etp, kind, etp) for _ in range(2))
    init_weights(expected, 7)
    init_weights(model, 8)
    read_tensors(Path(folder), model_tensors(model), dist.group.WORLD, prefixes=("model.",))
    theirs = dict(expected.named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(param, 1.5 * theirs[name]), name


@pytest.mark.parametrize(
    ("saved", "loaded"), [("grouped", "sequential"), ("sequential", "grouped")]
)
@pytest.mark.parametrize("etp", [1, 2])
def test_a_gpt_with_one_bank_of_experts_loads_what_the_other_saved(
    tmp_path: Path, saved: str, loaded: str, etp: int
) -> None:
    run_ranks(_save_model, 2, str(tmp_path), saved, etp)
    run_ranks(_load_model, 1, str(tmp_path), loaded, 1)
    run_ranks(_load_model, 4, str(tmp_path), loaded, 3 - etp)
    run_ranks(_load_model, 4, str(tmp_path), saved, 4)
