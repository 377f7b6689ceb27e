"""The proof as text: a summary, and the tables of docs/checkpoint_format.md. Pure."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.reshard.layouts import MODELS, Model
from tools.reshard.proof import Outcome, Proof
from tools.reshard.refusals import Refusal

BEGIN = "<!-- {name}, made by `make verify-reshard`: begin -->"
END = "<!-- {name}: end -->"


def summary(proofs: Sequence[Proof]) -> str:
    """Say in a sentence how it went."""
    done = [one for proof in proofs for one in proof.outcomes]
    wrong = sum(bool(one.problem) for one in done)
    worst, of = max((proof.worst for proof in proofs), default=(0.0, ""))
    parts = [f"{len(proof.outcomes)} {proof.model.name}" for proof in proofs]
    return (
        f"{len(done)} pairs ({', '.join(parts)}): {len(done) - wrong} proved, {wrong} wrong; worst "
        f"relative error {worst:.1e}{f' of {of}' if of else ''}"
    )


def sections(proofs: Sequence[Proof], refused: Sequence[Refusal]) -> dict[str, str]:
    """Return Markdown by the name of its place: ``layouts``, each model, ``refused``."""
    letters = letters_of(MODELS.values())
    found = {"layouts": _layouts(letters)}
    found |= {proof.model.name: _matrix(proof, letters) for proof in proofs}
    rows = [f"| {one.what} | {one.said.replace('|', '/')} |" for one in refused]
    return found | {"refused": "\n".join(["| what | why |", "|---|---|", *rows])}


def write_between_markers(page: Path, texts: Mapping[str, str]) -> None:
    """Replace what stands between the markers of each name in ``page``."""
    text = page.read_text()
    for name, new in texts.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        assert len(pattern.findall(text)) == 1, f"{page} needs one pair: {begin} ... {end}"
        text = pattern.sub(f"{begin}\n\n{new}\n\n{end}".replace("\\", r"\\"), text)
    page.write_text(text)


def letters_of(models: Sequence[Model]) -> dict[str, str]:
    """Return name of a layout -> its letter in the tables."""
    names = dict.fromkeys(layout.name for model in models for layout in model.layouts)
    return {name: chr(ord("A") + number) for number, name in enumerate(names)}


def _layouts(letters: Mapping[str, str]) -> str:
    known = {layout.name: layout for model in MODELS.values() for layout in model.layouts}
    rows = ["| | layout | ranks | options |", "|---|---|---|---|"]
    for name, letter in letters.items():
        words = " ".join(known[name].words[:-2]).replace("|", "\\|")  # samples: the model's
        rows.append(f"| {letter} | {name} | {known[name].ranks} | `{words}` |")
    return "\n".join(rows).replace(" | `` |", " | |")


def _matrix(proof: Proof, letters: Mapping[str, str]) -> str:
    names = [layout.name for layout in proof.model.layouts]
    outcomes = {(one.source, one.target): one for one in proof.outcomes}
    saved = {one.layout.name: one for one in proof.saved}
    words = " ".join(proof.model.words).replace("|", "\\|")
    rows = [
        f"**{proof.model.name}**: `{words}`",
        "",
        f"{summary([proof])}.",
        "",
        f"| | saved | {' | '.join(letters[name] for name in names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for source in names:
        cells = [_cell(outcomes.get((source, target)), proof) for target in names]
        found = saved.get(source)
        is_compared = proof.model.is_exact and found is not None
        error = _shown(found.error) if found is not None and is_compared else ""
        error = "FAILS" if found is not None and found.problem else error
        rows.append(f"| **{letters[source]}** | {error} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(outcome: Outcome | None, proof: Proof) -> str:
    if outcome is None:
        return ""
    if outcome.problem:
        return "FAILS"
    if outcome.source == outcome.target or not proof.model.is_exact:
        return "="
    return _shown(outcome.error)


def _shown(error: float) -> str:
    return "=" if error == 0.0 else f"{error:.0e}"
