"""A tensor that is missing, renamed, too many or of another shape is refused by name, both ways.

Every family, every one of its tensors; then on disk, through import and export, one tensor each.
Shapes are the plan's: that they are transformers' is shown where checkpoints of theirs come in.
"""

import functools
import itertools
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.mapping import MODEL
from megatron.core.dist_checkpointing.offline import OfflineWriter, StoredCheckpoint, shared_out
from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.accounting import account, compare_with_model
from megatron.core.models.huggingface.family import family_of
from megatron.core.models.huggingface.options import model_options
from megatron.core.models.huggingface.weight_plan import WeightPlan, weight_plan
from megatron.training.huggingface import export_checkpoint, import_checkpoint
from tests.helpers.hf_cases import CASES, RICHEST

Shapes = dict[str, tuple[int, ...]]
EXTRA = "model.layers.0.self_attn.gate_proj.weight"
FAMILIES = {CASES[name].family: name for name in RICHEST}
"""Family -> case: the pure comparisons look at all cases, disks at these."""
UNTIED = [name for name, case in CASES.items() if case.config.get("tie_word_embeddings") is False]
TIED = [name for name in CASES if name not in UNTIED]


class Damaged(dict):
    """Shapes that are wrong, and what an error must name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *names: str) -> None:
        super().__init__(shapes)
        self.names = names


def _removed(shapes: Shapes, key: str) -> Damaged:
    return Damaged({name: shape for name, shape in shapes.items() if name != key}, key)


def _renamed(shapes: Shapes, key: str) -> Damaged:
    return Damaged({**_removed(shapes, key), f"{key}_": shapes[key]}, key, f"{key}_")


def _extra(shapes: Shapes, key: str) -> Damaged:
    return Damaged({**shapes, EXTRA: shapes[key]}, EXTRA)


def _wrongly_shaped(shapes: Shapes, key: str) -> Damaged:
    shape = shapes[key]
    return Damaged({**shapes, key: (shape[0] + 1, *shape[1:])}, key)


DAMAGES: dict[str, Callable[[Shapes, str], Damaged]] = {
    "removed": _removed,
    "renamed": _renamed,
    "extra": _extra,
    "wrongly shaped": _wrongly_shaped,
}


@functools.cache
def plan_of(name: str) -> WeightPlan:
    config = CASES[name].config
    return weight_plan(family_of(config), model_options(config))


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_of_theirs_is_accounted_for(name):
    plan = plan_of(name)
    shapes = dict(plan.hf_shapes)
    account(plan, shapes)
    for key, damage in itertools.product(shapes, DAMAGES.values()):
        damaged = damage(shapes, key)
        with pytest.raises(CheckpointError) as refused:
            account(plan, damaged)
        _assert_told(refused, damaged.names)


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_of_ours_is_accounted_for(name):
    plan = plan_of(name)
    shapes = dict(plan.shapes)
    compare_with_model(plan, shapes)
    for key, damage in itertools.product(shapes, DAMAGES.values()):
        damaged = damage(shapes, key)
        with pytest.raises(CheckpointError) as refused:
            compare_with_model(plan, damaged)
        _assert_told(refused, damaged.names)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_import_of_a_damaged_folder_leaves_no_checkpoint(family, damage, tmp_path):
    plan = plan_of(FAMILIES[family])
    damaged = DAMAGES[damage](dict(plan.hf_shapes), _some_key(plan.hf_shapes, damage))
    folder = _written(FAMILIES[family], damaged, tmp_path / "hf")
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(folder, tmp_path / "ours")
    _assert_told(refused, damaged.names)
    assert not list((tmp_path / "ours").glob("iter_*"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_of_a_damaged_checkpoint_leaves_no_folder(family, damage, tmp_path):
    plan = plan_of(FAMILIES[family])
    import_checkpoint(
        _written(FAMILIES[family], plan.hf_shapes, tmp_path / "hf"), tmp_path / "ours"
    )
    damaged = DAMAGES[damage](dict(plan.shapes), _some_key(plan.shapes, damage))
    _rewritten(tmp_path / "ours", damaged, tmp_path / "damaged")
    with pytest.raises(CheckpointError) as refused:
        export_checkpoint(tmp_path / "damaged", tmp_path / "again")
    _assert_told(refused, damaged.names)
    assert not list(tmp_path.glob("again/*.safetensors"))


@pytest.mark.parametrize("name", TIED)
def test_an_output_layer_beside_tied_weights_must_be_the_embedding(name, tmp_path):
    plan = plan_of(name)
    embedding = next(iter(plan.hf_shapes))
    shapes = {**plan.hf_shapes, "lm_head.weight": plan.hf_shapes[embedding]}
    same = _written(name, shapes, tmp_path / "same", copies={"lm_head.weight": embedding})
    import_checkpoint(same, tmp_path / "ours")
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(_written(name, shapes, tmp_path / "other"), tmp_path / "theirs")
    _assert_told(refused, ("lm_head.weight", embedding))


@pytest.mark.parametrize("name", UNTIED)
def test_an_output_layer_of_its_own_must_be_there(name):
    plan = plan_of(name)
    with pytest.raises(CheckpointError) as refused:
        account(plan, _removed(dict(plan.hf_shapes), "lm_head.weight"))
    _assert_told(refused, ("lm_head.weight",))


def _assert_told(refused: pytest.ExceptionInfo[CheckpointError], names: tuple[str, ...]) -> None:
    for name in names:
        assert f" {name} " in f" {refused.value!s} ".replace("\n", " "), name


def _some_key(shapes: Mapping[str, tuple[int, ...]], damage: str) -> str:
    """Choose a tensor: another one for each family and damage, always the same one."""
    keys = sorted(shapes)
    return keys[zlib.crc32(f"{damage} {keys[-1]} {len(keys)}".encode()) % len(keys)]


def _written(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    copies: Mapping[str, str] | None = None,
) -> Path:
    """Write a folder with config.json and random tensors of these shapes."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CASES[name].config))
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    tensors |= {copy: tensors[key].clone() for copy, key in (copies or {}).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _rewritten(folder: Path, shapes: Mapping[str, tuple[int, ...]], target: Path) -> None:
    """Write a checkpoint like that in ``folder``, with random tensors of these shapes."""
    source = StoredCheckpoint.open(folder)
    some = source.facts(source.keys[0])
    stored = {MODEL + key: some._replace(shape=shape) for key, shape in shapes.items()}
    with OfflineWriter(target, 0, shared_out(stored, 1)) as writer:
        for key in writer.order:
            writer.add(key, torch.randn(stored[key].shape).to(some.dtype))
        writer.finish(dict(source.common), {})
