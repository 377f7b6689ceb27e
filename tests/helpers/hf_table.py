"""The proof of the exchange with Hugging Face as text: a line a case, and docs/hf_proofs.md."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.helpers.hf_cases import Case
from tests.helpers.hf_proof import LAYOUTS, PARTS, Apart, layouts_of

FP32, FP64 = torch.float32, torch.float64


@dataclass
class Outcome:
    """What became of a case."""

    name: str
    case: Case
    apart: dict[str, dict[torch.dtype, Apart]] = field(default_factory=dict)
    """Layout -> dtype -> figures; ``one`` is one process."""
    bit_equal: dict[str, int] = field(default_factory=dict)
    """Number format -> tensors that came back bit-equal."""
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Say how it went."""
        verdict = f"{len(self.problems)} PROBLEMS" if self.problems else "proved"
        worst = dict.fromkeys((FP32, FP64), 0.0)
        for on in self.apart.values():
            for dtype, figures in on.items():
                worst[dtype] = max(worst[dtype], figures.logits)
        return (
            f"{self.name:28}{verdict}; {len(self.apart)} layouts, worst logits "
            f"{worst[FP32]:.0e} in fp32, {worst[FP64]:.0e} in fp64"
        )


def write_page(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Replace what stands between the markers of the page of proofs."""
    text = path.read_text()
    for name, new in (
        ("summary", _summary(outcomes)),
        ("one process", _one(outcomes)),
        ("norms", _norms(outcomes)),
        ("layouts", _layouts(outcomes)),
    ):
        begin, end = f"<!-- {name}, made by `make verify-hf`: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        assert len(pattern.findall(text)) == 1, f"{path} needs one pair: {begin} ... {end}"
        text = pattern.sub(f"{begin}\n\n{new}\n\n{end}".replace("\\", r"\\"), text)
    path.write_text(text)


def _summary(outcomes: Sequence[Outcome]) -> str:
    import transformers

    families = len({one.case.family for one in outcomes})
    wrong = sum(bool(one.problems) for one in outcomes)
    runs = sum(len(one.apart) for one in outcomes)
    return (
        f"{len(outcomes)} checkpoints of {families} kinds, {runs} layouts of them, against "
        f"transformers {transformers.__version__}: {len(outcomes) - wrong} proved, {wrong} wrong."
    )


def _one(outcomes: Sequence[Outcome]) -> str:
    figures = ("logits", "loss", "gradients")
    names = ("logits", "loss", "worst gradient")
    head = ["checkpoint", "`model_type`", *(f"{name} fp32 | fp64" for name in names)]
    rows = [f"| {' | '.join([*head, 'tensors bit-equal fp32 | bf16'])} |", "|---" * 10 + "|"]
    for one in outcomes:
        found = one.apart.get("one", {})
        cells = [one.name, f"`{one.case.config['model_type']}`"]
        cells += [_shown(found, dtype, name) for name in figures for dtype in (FP32, FP64)]
        cells += [str(one.bit_equal.get(kind, "FAILS")) for kind in ("fp32", "bf16")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _norms(outcomes: Sequence[Outcome]) -> str:
    rows = [
        f"| checkpoint | {' | '.join(f'{part} fp32 | fp64' for part in PARTS)} |",
        "|---" * (1 + 2 * len(PARTS)) + "|",
    ]
    for one in outcomes:
        found = one.apart.get("one", {})
        cells = [
            _number(found[dtype].norms[part]) if dtype in found else "FAILS"
            for part in PARTS
            for dtype in (FP32, FP64)
        ]
        rows.append(f"| {one.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _layouts(outcomes: Sequence[Outcome]) -> str:
    rows = [
        *(f"- {name}: {on.ranks} ranks, `{on.words}`" for name, on in LAYOUTS.items()),
        "",
        f"| checkpoint | {' | '.join(LAYOUTS)} |",
        "|---" * (1 + len(LAYOUTS)) + "|",
    ]
    for one in outcomes:
        cells = []
        for layout in LAYOUTS:
            found = one.apart.get(layout, {})
            shown = f"{_shown(found, FP32, 'logits')}, {_shown(found, FP64, 'gradients')}"
            cells.append(shown if layout in layouts_of(one.name) else "")
        rows.append(f"| {one.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _shown(found: dict[torch.dtype, Apart], dtype: torch.dtype, figure: str) -> str:
    return _number(getattr(found[dtype], figure)) if dtype in found else "FAILS"


def _number(value: float) -> str:
    return f"{value:.0e}" if value else "0"
