"""Every tensor that is there is read, every one that is wanted is made: or one error names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.errors import CheckpointError
from megatron.core.models.huggingface.exchange import Read
from megatron.core.models.huggingface.quantized import PlainNumbers
from megatron.core.models.huggingface.weight_plan import WeightPlan

Shape = tuple[int, ...]
_MOST = 20


@dataclass(frozen=True)
class Accounting:
    """Which tensor of a folder is which of the plan."""

    names: Mapping[str, str]
    """Name of the plan -> name in the files."""
    ignored: tuple[str, ...]
    """Names in the files that are known to be no weights."""
    copies: Mapping[str, str]
    """Name in the files -> name in the files that it must be equal to."""


def account(plan: WeightPlan, found: Mapping[str, Shape]) -> Accounting:
    """Match the tensors of a folder with those of a plan.

    Args:
        plan: Of the model that config.json describes.
        found: Name -> shape of the tensors in the files.

    Raises:
        CheckpointError: Lists tensors that are missing, unexpected or of another shape, with
            the tensors of ours that they belong to.
    """
    names = _names(plan, found)
    in_files = {name: key for key, name in names.items()}
    missing = [key for key, name in names.items() if name not in found]
    copies = {
        name: names[original]
        for name, original in plan.copies.items()
        if name in found and name not in plan.hf_shapes
    }
    others = [name for name in found if name not in in_files and name not in copies]
    ignored = tuple(name for name in others if plan.is_ignored(name))
    unexpected = [name for name in others if name not in ignored]
    wrong = [
        (key, found[name])
        for key, name in names.items()
        if name in found and tuple(found[name]) != plan.hf_shapes[key]
    ]
    problems = [f"missing: {names[key]} {list(plan.hf_shapes[key])} ({_ours(plan, key)})"
                for key in missing]  # fmt: skip
    problems += [f"unexpected: {name} {list(found[name])} (no tensor here)" for name in unexpected]
    problems += [
        f"wrong shape: {names[key]} is {list(shape)} and must be {list(plan.hf_shapes[key])} "
        f"({_ours(plan, key)})"
        for key, shape in wrong
    ]
    refuse(f"the tensors are not those of the {plan.family.name} in config.json", problems)
    return Accounting(names, ignored, copies)


def compare_with_model(plan: WeightPlan, model: Mapping[str, Shape]) -> None:
    """Refuse a plan that does not make exactly the tensors of a model.

    Args:
        plan: Of the family.
        model: Our key, without ``model.`` -> shape of the model that its options build.

    Raises:
        CheckpointError: Lists the differences.
    """
    problems = [f"missing: {key} {list(shape)} of the model is not made of any tensor on disk"
                for key, shape in model.items() if key not in plan.shapes]  # fmt: skip
    problems += [
        f"unexpected: {_theirs(plan, key)} is {key} {list(shape)}, which the model does not have"
        for key, shape in plan.shapes.items()
        if key not in model
    ]
    problems += [
        f"wrong shape: {_theirs(plan, key)} gives {key} {list(shape)}, and the model has "
        f"{list(model[key])}"
        for key, shape in plan.shapes.items()
        if key in model and tuple(model[key]) != shape
    ]
    refuse(f"the model does not fit the family {plan.family.name}", problems)


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise one CheckpointError for all problems, the first of them in full, if there are any."""
    if not problems:
        return
    more = len(problems) - _MOST
    lines = [f"  - {text}" for text in problems[:_MOST]]
    lines += [f"  - and {more} more"] if more > 0 else []
    raise CheckpointError("\n".join([f"{what}:", *lines]))


def named_reader(source: PlainNumbers, accounted: Accounting) -> Read:
    """Return a function that reads tensors of a folder by their names in the plan."""

    def read(hf_key: str, rows: tuple[int, int] | None) -> Tensor:
        return source.read(accounted.names[hf_key], rows)

    return read


def refuse_other_copies(path: Path, source: PlainNumbers, accounted: Accounting) -> None:
    """Refuse a tensor that should repeat another one, as a tied output layer, and does not."""
    refuse(
        f"{path}: config.json ties tensors that differ",
        [
            f"{name} is not {original}"
            for name, original in accounted.copies.items()
            if not torch.equal(source.read(name), source.read(original))
        ],
    )


def _names(plan: WeightPlan, found: Mapping[str, Shape]) -> dict[str, str]:
    """Return name of the plan -> name in the files, whose names may begin behind the prefix."""
    prefix = plan.family.base_prefix
    is_bare = not any(name.startswith(prefix) for name in found)
    return {key: key.removeprefix(prefix) if is_bare else key for key in plan.hf_shapes}


def _ours(plan: WeightPlan, hf_key: str) -> str:
    keys = list(dict.fromkeys(piece.key for piece in plan.pieces_of_hf_key[hf_key]))
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]}{more} here"


def _theirs(plan: WeightPlan, key: str) -> str:
    names = list(dict.fromkeys(piece.hf_key for piece in plan.pieces_of_key[key]))
    return names[0] if len(names) == 1 else f"{names[0]} with {len(names) - 1} more"
