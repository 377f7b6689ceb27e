"""One case of the proof: their checkpoint, their figures, ours, and how far they are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.models.huggingface.family import family_of
from megatron.core.models.huggingface.options import model_options
from megatron.core.models.huggingface.weight_plan import WeightPlan, weight_plan
from megatron.training.config.run_config import RunConfig
from megatron.training.huggingface import export_checkpoint, import_checkpoint
from tests.helpers.hf_cases import CASES, VOCAB
from tests.helpers.hf_models import (
    Reference,
    config_of,
    make_checkpoint,
    references,
    stored_tensors,
    their_logits,
)
from tests.helpers.hf_ours import Layout, Ours, compute, run_config, train_and_save

LOGITS = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest absolute difference of logits, which are about 1. In fp64 1e-10 was asked for."""
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-12}
"""Of the loss, of the norm of all gradients and of each of them."""
PADDED_TO = 16
ROWS = -(-VOCAB // PADDED_TO) * PADDED_TO
PARTS = ("all", "embeddings", "attention", "MLPs", "norms")
"""Gradients whose norms are compared: their norm together, of each kind of tensor."""
_TP, _EP = "--tensor-model-parallel-size 2", "--expert-model-parallel-size 2"
_PP = "--pipeline-model-parallel-size 2"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ONE = Layout()
_DENSE_LAYOUTS = {
    "tp2": Layout(2, _TP),
    "pp2": Layout(2, _PP),
    "tp2 pp2": Layout(4, f"{_TP} --sequence-parallel {_PP}"),
}
_EXPERT_LAYOUTS = {
    "ep2": Layout(2, _EP),
    "tp2 ep2": Layout(4, f"{_TP} --sequence-parallel {_EP} --expert-tensor-parallel-size 1"),
    "ep2 pp2": Layout(4, f"{_EP} {_PP}"),
}
LAYOUTS = _DENSE_LAYOUTS | _EXPERT_LAYOUTS
"""Name -> layout. The axes alone, and two of them together."""


class Imported(NamedTuple):
    """A case, ready to be run."""

    name: str
    hf: Path
    checkpoints: dict[torch.dtype, Path]
    """As --load, in each number format."""
    theirs: dict[torch.dtype, Reference]
    plan: WeightPlan


class Apart(NamedTuple):
    """How far a layout is from their model, in one dtype."""

    logits: float
    loss: float
    norms: dict[str, float]
    """Of the gradients of each of ``PARTS``."""
    gradients: float
    """The worst of all, relative to its own norm."""
    worst: str
    """Which that is."""

    @property
    def relative(self) -> float:
        """The worst of all that is relative."""
        return max(self.loss, self.gradients, *self.norms.values())


def layouts_of(name: str) -> list[str]:
    """Return the layouts that a case is run on: those of experts only where it has some."""
    return list(LAYOUTS if CASES[name].experts else _DENSE_LAYOUTS)


def imported(name: str, folder: Path) -> Imported:
    """Make the checkpoint of a case, run their model, import it."""
    case, hf = CASES[name], folder / "hf"
    make_checkpoint(case, hf)
    theirs = references(case, hf, folder / "theirs")
    config = config_of(hf)
    checkpoints = {torch.float32: folder / "fp32", torch.float64: folder / "fp64"}
    import_checkpoint(hf, folder / "fp32", make_vocab_size_divisible_by=PADDED_TO)
    import_checkpoint(hf, folder / "fp64", make_vocab_size_divisible_by=PADDED_TO, dtype="fp64")
    options = model_options(config)
    options["padded_vocab_size"] = ROWS
    plan = weight_plan(family_of(config), options, vocab_size=VOCAB)
    return Imported(name, hf, checkpoints, theirs, plan)


def run(case: Imported, layout: Layout, dtypes: Sequence[torch.dtype]) -> list[Ours]:
    """Run the imported checkpoint on a layout, in each dtype."""
    return _run(case, layout, [(case.checkpoints[dtype], dtype) for dtype in dtypes])


def refuse_other_start(case: Imported, layout: Layout, imported_run: Ours) -> None:
    """Raise unless a run that begins with their folder itself is the fp32 run, bit for bit."""
    (straight,) = _run(case, layout, [(case.hf, torch.float32)])
    first, second = imported_run.result, straight.result
    assert torch.equal(first.logits, second.logits), "logits of --load of their folder differ"
    for key, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[key]), key


def check_trained_export(case: Imported, layout: Layout, folder: Path) -> None:
    """Train a step on a layout, save, export: transformers computes what is computed here.

    Raises:
        AssertionError: It does not, or the step changed nothing.
    """
    config = _config(case, layout, case.hf, torch.float32)
    logits = train_and_save(config, layout.ranks, folder / "trained")
    done = export_checkpoint(folder / "trained", folder / "exported", reference=case.hf)
    assert done.family == case.plan.family, f"went out as {done.family.name}"
    theirs = their_logits(CASES[case.name], folder / "exported")
    assert float((logits - case.theirs[torch.float32].logits).abs().max()) > 1e-2, "untrained"
    assert float((logits - theirs).abs().max()) <= LOGITS[torch.float32]


def _run(case: Imported, layout: Layout, starts: Sequence[tuple[Path, torch.dtype]]) -> list[Ours]:
    configs = [_config(case, layout, folder, dtype) for folder, dtype in starts]
    return compute(configs, layout.ranks, case.plan)


def _config(case: Imported, layout: Layout, folder: Path, dtype: torch.dtype) -> RunConfig:
    is_sparse = CASES[case.name].experts > 0
    return run_config(folder, layout, dtype, is_sparse=is_sparse, rows=ROWS)


def apart(theirs: Reference, ours: Ours) -> Apart:
    """Compare a run of ours with theirs.

    Raises:
        AssertionError: The gradients are not of the same tensors.
    """
    mine = ours.result
    assert mine.gradients.keys() == theirs.gradients.keys(), (
        mine.gradients.keys() ^ theirs.gradients.keys()
    )
    errors = {key: _relative(mine.gradients[key], want) for key, want in theirs.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    norms = norms_of(theirs.gradients)
    of_ours = norms_of(mine.gradients) | {"all": ours.grad_norm}  # as the step told it
    return Apart(
        logits=float((mine.logits - theirs.logits).abs().max()),
        loss=abs(mine.loss / theirs.loss - 1.0),
        norms={part: abs(of_ours[part] / norm - 1.0) for part, norm in norms.items()},
        gradients=errors[worst],
        worst=worst,
    )


def refuse_far(found: Apart, dtype: torch.dtype) -> None:
    """Raise AssertionError if a figure is beyond what its dtype allows."""
    allowed = RELATIVE[dtype]
    assert found.logits <= LOGITS[dtype], found
    assert found.relative <= allowed, found


def norms_of(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the norm of the gradients of each of ``PARTS``, by names of theirs."""
    squares = dict.fromkeys(PARTS, 0.0)
    for key, gradient in gradients.items():
        size = float(gradient.double().square().sum())
        for part in ("all", part_of(key)):
            squares[part] += size
    return {part: size**0.5 for part, size in squares.items()}


def part_of(key: str) -> str:
    """Return which of ``PARTS`` a tensor of theirs belongs to."""
    if "norm" in key or "ln_" in key:
        return "norms"
    if any(word in key for word in ("embed", "wte", "wpe", "lm_head")):
        return "embeddings"
    return "attention" if "attn" in key else "MLPs"


def check_round_trip(case: Imported, folder: Path) -> int:
    """Export into ``folder``; return the number of tensors, each bit-equal and taken by theirs.

    Raises:
        AssertionError: A tensor differs, or transformers does not take the folder as it is.
    """
    export_checkpoint(case.checkpoints[torch.float32], folder)
    number = refuse_other_bits(case.hf, folder)
    before, after = config_of(case.hf), config_of(folder)
    for name in _TOKEN_IDS:
        assert before.get(name) == after.get(name), f"{name} of config.json changed"
    same = torch.equal(their_logits(CASES[case.name], folder), case.theirs[torch.float32].logits)
    assert same, "the config.json that was written means another model"
    return number


def check_round_trip_in_bf16(name: str, folder: Path) -> int:
    """Take the checkpoint of a case in bf16 in and out again; return the number of tensors."""
    make_checkpoint(CASES[name], folder / "hf", dtype=torch.bfloat16)
    import_checkpoint(folder / "hf", folder / "ours")
    export_checkpoint(folder / "ours", folder / "again")
    return refuse_other_bits(folder / "hf", folder / "again")


def refuse_other_bits(before: Path, after: Path) -> int:
    """Compare all tensors of two folders, bit for bit; return how many there are."""
    first, second = stored_tensors(before), stored_tensors(after)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key
    return len(first)


def _relative(mine: Tensor, want: Tensor) -> float:
    """Distance of two tensors over the norm of the second; absolute where that is zero."""
    assert mine.shape == want.shape, f"{mine.shape} is not {want.shape}"
    size, distance = float(want.double().norm()), float((mine - want).double().norm())
    return distance / size if size > 0.0 else distance
