"""The proof for people, as a table in plain text, and for programs, as JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

from tools.resume.compare import AT_LOAD, Difference, Findings
from tools.resume.items import ITEMS, Item
from tools.resume.other_layouts import Outcome
from tools.resume.proof import Proof, Settings

SAME, DIFFERS, FOLLOWS, NOT_THERE = "same", "DIFFERS", "follows", "-"


def text(settings: Settings, proof: Proof) -> str:
    """Return the report: items, layouts, the first difference and its likely cause, verdict."""
    lines = ["", *_items(proof), *_layouts(proof.others), *_first(proof)]
    lines += ["", verdict(settings, proof)]
    return "\n".join(lines)


def _items(proof: Proof) -> Iterator[str]:
    killed = proof.killed
    yield (
        f"The resumed run against the unbroken one, bit for bit: loading iteration "
        f"{killed.checkpoint}, then steps {killed.checkpoint + 1} to {proof.iterations}"
    )
    yield ""
    head = ["item", "compared", "verdict", "first difference"]
    repeat = _verdict_of_repeating(proof.before)
    rows = [["repeatable", f"steps up to the kill, {_count(proof.before)} values", *repeat]]
    causes = {one.item.name for one in proof.resumed.causes()}
    for item in ITEMS:
        first = proof.resumed.first_of(item)
        compared = proof.resumed.compared[item.name]
        rows.append([item.name, _compared(item, compared), *_verdict(first, compared, causes)])
    yield from table([head, *rows])


def _verdict(first: Difference | None, compared: int, causes: set[str]) -> list[str]:
    if first is None:
        return [SAME if compared else NOT_THERE, ""]
    moment = "loading" if first.when == AT_LOAD else f"step {first.iteration}"
    values = " -> ".join(_short(first.want, first.got))
    where = f"{moment}, {first.where}: {values}"
    return [DIFFERS if first.item.name in causes else FOLLOWS, where]


def _verdict_of_repeating(before: Findings) -> list[str]:
    causes = before.causes()
    if not causes:
        return [SAME, ""]
    return [DIFFERS, f"{causes[0].item.name}, step {causes[0].iteration}, {causes[0].where}"]


def _count(findings: Findings) -> int:
    return sum(findings.compared.values())


def _compared(item: Item, count: int) -> str:
    if not count:
        return "none in this run"
    return f"{count} {'tensors' if _is_tensor(item) else 'values'}"


def _is_tensor(item: Item) -> bool:
    return item.name in (
        "weights",
        "experts",
        "main weights",
        "first moment",
        "second moment",
        "expert bias",
        "buffers",
    )


def _short(one: str, other: str) -> list[str]:
    """Write numbers with few digits, unless they would look alike then."""
    try:
        few = [f"{float(value):.6g}" for value in (one, other)]
    except ValueError:
        return [one, other]
    return few if few[0] != few[1] else [one, other]


def _layouts(others: Sequence[Outcome]) -> Iterator[str]:
    if not others:
        return
    yield ""
    yield ("The same checkpoint on other layouts: what is loaded, samples and rates bit for bit;")
    yield "losses, gradient norms and weights, whose sums have another order, within (a tolerance)"
    yield ""
    rows = [["layout", "loaded, read", "loss", "norm", "weights", "experts of tokens", "verdict"]]
    for other in others:
        errors = list(map(_error, other.errors[:3], other.tolerance[:3]))
        exact = DIFFERS if other.exact.differences else f"{_count(other.exact)} {SAME}"
        cells = [NOT_THERE] * 5 if other.failure else [exact, *errors, _tie(other)]
        rows.append([other.layout, *cells, "pass" if other.passes else "FAIL"])
    yield from table(rows)


def _error(error: float, most: float) -> str:
    return f"{error:.0e} ({most:.0e})"


def _tie(other: Outcome) -> str:
    if other.tie is None:
        return SAME
    return f"{other.errors.moved:.0e} ({other.tolerance.moved:.0e}) at step {other.tie}"


def _first(proof: Proof) -> Iterator[str]:
    """Yield what came first, and what to suspect."""
    if proof.before.differences:
        cause = proof.before.causes()[0]
        yield from ["", f"first: {cause.item.name}, {cause}"]
        yield (
            "likely: the run does not repeat itself, resumed or not: something depends on the "
            "clock, on the rank's process or on the order of sums; nothing below is proved"
        )
        return
    if proof.failure:
        yield from ["", f"first: no resumed run: {proof.failure}"]
    for cause in proof.resumed.causes():
        yield from ["", f"first: {cause.item.name}, {cause}", f"likely: {hint(proof, cause)}"]
    for other in proof.others:
        if other.failure:
            yield from ["", other.failure]
        for cause in other.exact.causes():
            yield from ["", f"{other.layout}: {cause.item.name}, {cause}"]
        if not other.passes and not other.failure and other.worst:
            yield f"{other.layout}: weights are farthest apart in {other.worst}"


def hint(proof: Proof, cause: Difference) -> str:
    """Return what was probably left out."""
    said = cause.item.after_loading if cause.when == AT_LOAD else cause.item.in_a_step
    wheres = [
        one.where
        for one in proof.resumed.differences
        if one.item is cause.item and one.moment == cause.moment
    ]
    parts = [where.partition(".local_experts.") for where in wheres]
    numbers = {rest.partition(".")[0] for _, found, rest in parts if found}
    if len(numbers) == 1 and all(found for _, found, _ in parts):
        said += f"; of all experts only number {numbers.pop()} differs"
    more = len(wheres) - 1
    return f"{said} ({more} more like it)" if more else said


def verdict(settings: Settings, proof: Proof) -> str:
    """Return the last line."""
    count = len(proof.others)
    others = f" and {count} other layout{'s' if count > 1 else ''}" if count else ""
    if proof.passes:
        return (
            f"PASS: resumed at iteration {proof.killed.checkpoint} after SIGKILL, the run is the "
            f"unbroken run on {settings.world_size} ranks{others} (seed {settings.seed})"
        )
    names = [cause.item.name for cause in proof.resumed.causes()]
    if proof.before.differences:
        names = ["repeatable"]
    names += [other.layout for other in proof.others if not other.passes]
    names += ["no resumed run"] if proof.failure else []
    return f"FAIL: {', '.join(names)} (seed {settings.seed})"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield aligned lines, with a rule below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()
        if number == 0:
            yield "  ".join("-" * width for width in widths)


def data(settings: Settings, proof: Proof) -> dict[str, Any]:
    """Return the report as plain JSON data."""
    causes = {one.item.name for one in proof.resumed.causes()}
    items = []
    for item in ITEMS:
        first, compared = proof.resumed.first_of(item), proof.resumed.compared[item.name]
        items.append(
            {
                "item": item.name,
                "compared": compared,
                "verdict": _verdict(first, compared, causes)[0],
                "first": None if first is None else _plain(first),
            }
        )
    return {
        "passes": proof.passes,
        "seed": settings.seed,
        "ranks": settings.world_size,
        "iterations": proof.iterations,
        "killed": proof.killed._asdict(),
        "failure": proof.failure,
        "repeatable": not proof.before.differences,
        "items": items,
        "causes": [
            {**_plain(cause), "likely": hint(proof, cause)} for cause in proof.resumed.causes()
        ],
        "layouts": [
            {
                "layout": other.layout,
                "passes": other.passes,
                "failure": other.failure,
                "errors": other.errors._asdict() if not other.failure else None,
                "tolerance": other.tolerance._asdict(),
                "first_tie": other.tie,
                "differences": [_plain(one) for one in other.exact.causes()],
                "seconds": other.seconds,
            }
            for other in proof.others
        ],
        "seconds": proof.seconds,
    }


def _plain(one: Difference) -> dict[str, Any]:
    moment = "loading" if one.when == AT_LOAD else "step"
    fields = {name: value for name, value in one._asdict().items() if name not in ("when", "item")}
    return {"item": one.item.name, "moment": moment, **fields}
