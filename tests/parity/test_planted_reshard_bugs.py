"""R10, R11: mistakes of saving and loading on another layout, planted one by one, are named."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing import mapping
from megatron.core.errors import CheckpointError
from megatron.core.optimizer.base_optimizer import BaseOptimizer
from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.param_role import LogicalShard
from megatron.training import checkpointing
from megatron.training.checkpointing import load_checkpoint
from megatron.training.config.run_config import RunConfig
from tools.layouts.oracle import make_run
from tools.layouts.ranks import run_ranks
from tools.reshard.blocks import blocks_of
from tools.reshard.layouts import FP16, TIED
from tools.reshard.on_ranks import train_and_save
from tools.reshard.proof import Proof

Plant = Callable[[pytest.MonkeyPatch], None]
ONE, TP, ZERO1, EP = "one", "tp2 sp sequential", "dp3 zero1", "dp2 ep2 zero3"


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """What one process saved, before any bug is there."""
    made = Proof(TIED, tmp_path_factory.mktemp("saved"))
    assert made.save(TIED.layout(ONE)).problem == ""
    return made


def _reads(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    """Plant: what is read goes elsewhere for some keys."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = checkpointing.read_tensors

        def read(path: Any, tensors: dict[str, Any], *args: Any, **options: Any) -> None:
            right(path, change(tensors), *args, **options)

        patch.setattr(checkpointing, "read_tensors", read)

    return plant


def _elsewhere(words: str, *, from_rank: int = 0) -> Plant:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        if torch.distributed.get_rank() < from_rank:
            return tensors
        return {
            key: torch.empty(tensor.shape, dtype=tensor.dtype)
            if words in key and isinstance(tensor, torch.Tensor)
            else tensor
            for key, tensor in tensors.items()
        }

    return _reads(change)


def _blocks(change: Callable[[list[LogicalShard]], list[LogicalShard]]) -> Plant:
    """Plant: blocks that are saved and loaded lie elsewhere, or are called otherwise."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        for name in ("logical_shards", "block_shards"):
            patch.setattr(mapping, name, _changed(getattr(mapping, name)))

    def _changed(right: Callable[..., Iterator[LogicalShard]]) -> Callable[..., Any]:
        return lambda *args: iter(change(list(right(*args))))

    return plant


def _ids_shifted(shards: list[LogicalShard]) -> list[LogicalShard]:
    """The second half of 8 experts, on the second rank, begins one too late."""
    if torch.distributed.get_rank() == 0 or torch.distributed.get_world_size() == 1:
        return shards
    ids = {f".local_experts.{4 + n}.": f".local_experts.{4 + (n + 1) % 4}." for n in range(4)}
    return [
        next(
            (s._replace(name=s.name.replace(a, b)) for a, b in ids.items() if a in s.name),
            s,
        )
        for s in shards
    ]


def _halves_swapped(shards: list[LogicalShard]) -> list[LogicalShard]:
    if len(shards) == 2 and "linear_fc1" in shards[0].name:
        one, other = shards
        return [one._replace(offset=other.offset), other._replace(offset=one.offset)]
    if len(shards) == 16 and "linear_fc1" in shards[0].name:
        return [one for n in range(0, 16, 2) for one in _halves_swapped(shards[n : n + 2])]
    return shards


def _slice_misplaced(shards: list[LogicalShard]) -> list[LogicalShard]:
    """A slice that does not begin with the first row is one row too high."""
    return [
        s._replace(offset=(s.offset[0] - 1, *s.offset[1:])) if s.offset and s.offset[0] else s
        for s in shards
    ]


def _step_count_forgotten(patch: pytest.MonkeyPatch) -> None:
    count = property(lambda self: self._flat_step.step_count, lambda self, count: None)
    patch.setattr(BaseOptimizer, "step_count", count)


def _steps_of_parameters_forgotten(patch: pytest.MonkeyPatch) -> None:
    def set_count(self: FlatStep, count: int) -> None:
        self._step_count = count

    patch.setattr(FlatStep, "step_count", property(lambda self: self._step_count, set_count))


def _samples_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = checkpointing.LoadedState

    def loaded(**values: Any) -> Any:
        return right(**(values | {"consumed_train_samples": 0}))

    patch.setattr(checkpointing, "LoadedState", loaded)


def _buffers_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mapping, "_persistent_buffers", lambda model: iter(()))


def _one_rank_raises(patch: pytest.MonkeyPatch) -> None:
    right = checkpointing.read_tensors

    def read(*args: Any, **options: Any) -> None:
        right(*args, **options)
        if torch.distributed.get_rank() == 1:
            raise ValueError("a rank that fails alone")

    patch.setattr(checkpointing, "read_tensors", read)


ON_LOAD: dict[str, tuple[Plant, str, str]] = {  # what, loaded at, what must be said
    "second moment left out": (
        _elsewhere("optimizer.exp_avg_sq."),
        ONE,
        r"after loading: optimizer\.exp_avg_sq\.embedding\.\S+\[0, 0\] is nan on rank 0, must be ",
    ),
    "expert bias left out": (
        _elsewhere("expert_bias"),
        ONE,
        r"after loading: model\.\S+\.expert_bias\[0\] is nan on rank 0",
    ),
    "replica forgotten": (
        _elsewhere("final_layernorm.weight", from_rank=1),
        TP,
        r"after loading: model\.decoder\.final_layernorm\.weight\[0\] is nan on rank 1",
    ),
    "experts shifted by EP rank": (
        _blocks(_ids_shifted),
        EP,
        r"after loading: model\.\S+\.local_experts\.4\.linear_fc1\.gate\.\S+, 0\] is .* on rank 1",
    ),
    "gate and up swapped": (
        _blocks(_halves_swapped),
        TP,
        r"after loading: model\.\S+\.linear_fc1\.gate\.\S+\[0, 0\] is .* on rank 0",
    ),
    "slice of ZeRO misplaced": (
        _blocks(_slice_misplaced),
        ZERO1,
        r"after loading: optimizer\.exp_avg\.\S+\[\d+, 0\] is .* on rank [012]",
    ),
    "step count forgotten": (
        _step_count_forgotten,
        ONE,
        r"after loading: step_count is 0 on rank 0, must be 2",
    ),
    "samples forgotten": (
        _samples_forgotten,
        ONE,
        r"after loading: consumed_train_samples is 0 on rank 0, must be 24",
    ),
    "steps of parameters forgotten": (
        _steps_of_parameters_forgotten,
        ONE,
        r"step 4: lm loss is \S+ on rank 0, must be ",  # step 3 is made of what was loaded
    ),
    "buffers not asked for": (
        _buffers_forgotten,
        ONE,
        r"(?s)refused: .*2 tensors in the checkpoint, but no rank of this run wants them:.*_bias",
    ),
    "a rank that raises": (_one_rank_raises, TP, r"^ValueError: a rank that fails alone$"),
}
QUICK = ("second moment left out", "gate and up swapped", "slice of ZeRO misplaced")
NAMED = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow], id=name)
    for name in ON_LOAD
]


@pytest.mark.parametrize("name", NAMED)
def test_a_mistake_of_loading_is_named(
    name: str, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, target, said = ON_LOAD[name]
    plant(monkeypatch)
    (outcome,) = proof.load(TIED.layout(target), [ONE])
    assert re.search(said, outcome.problem), outcome


@pytest.mark.slow
def test_a_loss_scale_that_is_forgotten_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = Proof(FP16, tmp_path)
    assert proof.save(FP16.layout(ONE)).problem == ""
    monkeypatch.setattr(DynamicGradScaler, "load_state_dict", lambda self, state: None)
    (outcome,) = proof.load(FP16.layout(EP), [ONE])
    assert re.search(
        r"after loading: loss_scale is {'scale': 65536.0, 'growth_tracker': 0, .* on rank 0, "
        r"must be {'scale': 65536.0, 'growth_tracker': 2,",
        outcome.problem,
    )


def _saves(change: Callable[[dict[str, Any]], None], of: str = "model_tensors") -> Plant:
    """Plant: ranks offer other tensors to be saved."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = getattr(checkpointing, of)

        def tensors(*args: Any) -> dict[str, Any]:
            found = right(*args)
            change(found)
            return found

        patch.setattr(checkpointing, of, tensors)

    return plant


def _forget_expert(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if ".local_experts.5." in key]:
        del tensors[key]


def _one_more(tensors: dict[str, Any]) -> None:
    tensors["model.decoder.layers.4.mlp.router.weight"] = torch.zeros(8, 16)


ON_SAVE: dict[str, tuple[Plant, str, str]] = {  # what, saved at, what must be said
    "experts shifted by EP rank": (
        _blocks(_ids_shifted),
        EP,
        r"what was saved: model\.\S+\.local_experts\.\d\.linear_fc\d\.\S+\[.*\] is ",
    ),
    "gate and up swapped": (
        _blocks(_halves_swapped),
        TP,
        r"what was saved: model\.\S+\.linear_fc1\.(gate|up)\.\S+\[.*\] is ",
    ),
    "weights of an expert left out": (
        _saves(_forget_expert),
        EP,
        r"what was saved: elements of model on disk is \d+, must be \d+",
    ),
    "moments of an expert left out": (
        _saves(_forget_expert, "optimizer_tensors"),
        EP,
        r"what was saved: elements of optimizer\.exp_avg on disk is \d+, must be \d+",
    ),
    "a layer too many": (
        _saves(_one_more),
        EP,
        r"what was saved: elements of model on disk is \d+, must be \d+",
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "experts shifted by EP rank" else pytest.mark.slow)
        for name in ON_SAVE
    ],
)
def test_a_mistake_of_saving_is_named(
    name: str, proof: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, source, said = ON_SAVE[name]
    plant(monkeypatch)
    other = Proof(TIED, tmp_path, one=proof.one)
    assert re.search(said, other.save(TIED.layout(source)).problem)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (_saves(_forget_expert), "12 tensors missing in the checkpoint:"),
        (_saves(_one_more), "1 tensors in the checkpoint, but no rank of this run wants them:"),
    ],
)
def test_another_layout_refuses_what_has_too_little_or_too_much(
    plant: Plant, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        plant(patch)
        run_ranks(train_and_save, 1, TIED.config(TIED.layouts[0]), tmp_path)
    run_ranks(_refuses, 2, TIED.config(TIED.layout(TP)), tmp_path / "saved", said)


def _refuses(config: RunConfig, folder: Path, said: str) -> None:
    run = make_run(config)
    before = [block.tensor.clone() for _, block in blocks_of(run)]
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder, config=config, model=run.model, optimizer=run.optimizer)
    for (key, block), old in zip(blocks_of(run), before, strict=True):
        assert torch.equal(block.tensor, old), f"{key} was changed by a load that was refused"
