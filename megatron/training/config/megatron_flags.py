"""Megatron-LM's flags as facts (megatron_flags.tsv beside this file), and an answer for each."""

import functools
from dataclasses import dataclass
from pathlib import Path

from megatron.training.config.flag_answers import GROUPS, NO_EFFECT, PREFIXES, SUBSTITUTES
from megatron.training.config.options import did_you_mean


@dataclass(frozen=True, kw_only=True)
class MegatronFlag:
    """One row of the table, its words as they stand there."""

    group: str
    flags: tuple[str, ...]
    dest: str
    type: str
    """``int``, ``str`` ...; ``flag`` turns on, ``flag(off)`` turns off and is True when absent."""
    nargs: str
    choices: tuple[str, ...]
    default: str
    """Python text of the value when the flag is absent."""


@functools.cache
def megatron_flags() -> dict[str, MegatronFlag]:
    """Read the table; every spelling of a flag is a key."""
    lines = Path(__file__).with_suffix(".tsv").read_text(encoding="ascii").splitlines()[1:]
    found: dict[str, MegatronFlag] = {}
    for line in lines:
        group, flags, dest, kind, nargs, choices, default = line.split("\t")
        row = MegatronFlag(
            group=group,
            flags=tuple(flags.split()),
            dest=dest,
            type=kind,
            nargs=nargs,
            choices=tuple(choices.split("|")) if choices else (),
            default=default,
        )
        found |= dict.fromkeys(row.flags, row)
    return found


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What becomes of a flag that is no option."""

    accepted: bool
    text: str
    """A notice if accepted, else a problem. A sentence without a full stop."""


def answer(flag: str, values: list[str]) -> Answer | None:
    """Answer a flag that is no option here; None if Megatron-LM does not have it either.

    Args:
        flag: With its dashes.
        values: The words after it.
    """
    if flag in NO_EFFECT:
        return _answer_without_effect(flag, values)
    if flag not in megatron_flags():
        return None
    text = f"{flag} is a Megatron-LM flag not offered here: {_why(flag)}"
    return Answer(accepted=False, text=text)


def _answer_without_effect(flag: str, values: list[str]) -> Answer:
    entry, typed = NO_EFFECT[flag], " ".join([flag, *values])
    if entry.values is None or (values and values[0] in entry.values):
        return Answer(accepted=True, text=f"{typed} has no effect: {entry.why}")
    row = megatron_flags()[flag]
    known = [choice.rpartition(".")[2] for choice in row.choices]
    if known and values and values[0] not in known:
        hint = did_you_mean(values[0], known)
        return Answer(accepted=False, text=f"{typed} is no value of it ({', '.join(known)}){hint}")
    allowed = " or ".join(entry.values)
    instead = entry.otherwise or "leave it out"
    return Answer(
        accepted=False, text=f"{typed} is not offered, only {allowed} ({entry.why}): {instead}"
    )


def _why(flag: str) -> str:
    """Return reason and substitute: of the flag, else of its prefix, else of its group."""
    if flag in SUBSTITUTES:
        return SUBSTITUTES[flag]
    for prefix, reason in PREFIXES:
        if flag.startswith(prefix):
            return reason
    return GROUPS[megatron_flags()[flag].group]
