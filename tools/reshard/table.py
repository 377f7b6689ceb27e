"""The proof as text: a summary, and the tables of docs/checkpoint_format.md. Pure."""

import re
from collections.abc import Sequence
from pathlib import Path

from tools.reshard.layouts import MORE_STEPS, SAVED_AT
from tools.reshard.proof import Outcome, Proof
from tools.reshard.refusals import Refusal

BEGIN, END = "<!-- made by `make verify-reshard`: begin -->", "<!-- end -->"

HOW = f"""Each layout trained {SAVED_AT} steps and saved. Every other one loaded that into memory
full of NaN, was compared bit by bit on every rank with what had been saved (weights, buffers with
the expert bias, both moments, fp32 main weights, step count, iteration, samples, dropout seed),
saved it again, and those files were compared too (keys both ways, elements of the model, every
bit). Then it trained {MORE_STEPS} more steps; losses, gradient norms, learning rates, and weights
and moments after them were compared with one process that never stopped. A cell is the largest
difference / the largest element of the worst of these; on the diagonal every bit must be that of
the same layout without a stop. Rows saved, columns loaded; a pair that is wrong would say `FAILS`
and the command would end with the first key, its global place and both values."""


def summary(proofs: Sequence[Proof]) -> str:
    """Say in a sentence how it went."""
    done = [one for proof in proofs for one in proof.outcomes]
    wrong = sum(bool(one.problem) for one in done)
    worst, of = max((proof.worst for proof in proofs), default=(0.0, ""))
    parts = [f"{len(proof.outcomes)} {proof.model.name}" for proof in proofs]
    seconds = sum(proof.seconds for proof in proofs)
    return (
        f"{len(done)} pairs ({', '.join(parts)}): {len(done) - wrong} proved, {wrong} wrong; worst "
        f"relative error {worst:.1e}{f' of {of}' if of else ''}; {seconds / 60:.1f} minutes"
    )


def section(proofs: Sequence[Proof], refused: Sequence[Refusal]) -> str:
    """Return all tables in Markdown."""
    letters = _letters(proofs)
    parts = [HOW, "", f"{summary(proofs)}.", "", *_layouts(proofs, letters)]
    for proof in proofs:
        parts += ["", *_matrix(proof, letters)]
    parts += ["", "Refused, with what is said (the layouts and models above are compared):", ""]
    parts += ["| what | why |", "|---|---|"]
    parts += [f"| {one.what} | {one.said.replace('|', '/')} |" for one in refused]
    return "\n".join(parts)


def write_between_markers(page: Path, text: str) -> None:
    """Replace what stands between the markers of ``page``."""
    old = page.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(old)) == 1, f"{page} needs one pair of markers: {BEGIN} ... {END}"
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old))


def _letters(proofs: Sequence[Proof]) -> dict[str, str]:
    names = dict.fromkeys(layout.name for proof in proofs for layout in proof.model.layouts)
    return {name: chr(ord("A") + number) for number, name in enumerate(names)}


def _layouts(proofs: Sequence[Proof], letters: dict[str, str]) -> list[str]:
    exact = [proof for proof in proofs if proof.model.is_exact]
    heads = " | ".join(f"saved by {proof.model.name}" for proof in exact)
    ranks_of = {one.name: one.ranks for proof in proofs for one in proof.model.layouts}
    rows = [f"| | layout | ranks | {heads} |", "|---|---|---|" + "---|" * len(exact)]
    for name, letter in letters.items():
        found = {p.model.name: one for p in exact for one in p.saved if one.layout.name == name}
        errors = [_shown(found[p.model.name].error) if p.model.name in found else "" for p in exact]
        rows.append(f"| {letter} | `{name}` | {ranks_of[name]} | {' | '.join(errors)} |")
    return rows


def _matrix(proof: Proof, letters: dict[str, str]) -> list[str]:
    names = [layout.name for layout in proof.model.layouts]
    outcomes = {(one.source, one.target): one for one in proof.outcomes}
    model = " ".join(proof.model.words).replace("|", "\\|")
    rows = [
        f"**{proof.model.name}**: `{model}`",
        "",
        f"| | {' | '.join(letters[name] for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for source in names:
        cells = [_cell(outcomes.get((source, target)), proof) for target in names]
        rows.append(f"| **{letters[source]}** | {' | '.join(cells)} |")
    return rows


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
