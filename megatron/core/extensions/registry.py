"""Which implementation of an op a run uses, and why. Optional packages are looked for here only.

An implementation registers itself under an op; ``resolve`` chooses once, when a module is built,
never in a forward. The one from torch always exists.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

from megatron.core.errors import BackendError

_MODULES = ("torch_native", "apex", "grouped_gemm")
"""Files of this folder that register implementations."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an op."""

    name: str
    function: Callable[..., Any]
    prefer: int
    """The largest usable one is chosen under ``auto``; 0 for torch's own."""
    why: str
    """A phrase about its place: why it is preferred, or why it is not."""
    unusable: Callable[[], str | None]
    """Says why it cannot be used on this machine, or None."""


class Choice(NamedTuple):
    """One row of the start-up banner."""

    op: str
    chosen: str
    why: str
    also_known: str


_OPS: dict[str, list[Implementation]] = {}


def register(
    op: str,
    name: str,
    *,
    prefer: int = 0,
    why: str,
    unusable: Callable[[], str | None] = lambda: None,
) -> Callable[[FunctionT], FunctionT]:
    """Return a decorator that offers a function as implementation ``name`` of ``op``.

    Args:
        op: Name of the op; all its implementations have the same signature.
        name: Package the implementation needs, or ``torch_native``.
        prefer: See ``Implementation``, also for ``why`` and ``unusable``.
        why: See ``Implementation``.
        unusable: See ``Implementation``; called late, and must not raise.
    """

    def offer(function: FunctionT) -> FunctionT:
        _OPS.setdefault(op, []).append(
            Implementation(name=name, function=function, prefer=prefer, why=why, unusable=unusable)
        )
        return function

    return offer


def resolve(op: str, wanted: str = "auto") -> Callable[..., Any]:
    """Return the implementation of ``op`` to use.

    Args:
        op: A registered op.
        wanted: Name of an implementation, or ``auto`` for the preferred one that is usable.

    Raises:
        BackendError: ``wanted`` is unknown or cannot be used here; the message says why, and
            what can.
    """
    return _choose(op, wanted).function


def table(wanted: Mapping[str, str] | None = None) -> list[Choice]:
    """Return what is chosen for each op, for the start-up banner.

    Args:
        wanted: Op -> what ``resolve`` is asked for; ``auto`` for those it leaves out.

    Raises:
        BackendError: See ``resolve``.
    """
    asked = wanted or {}
    rows = []
    for op in sorted(_known()):
        chosen = _choose(op, asked.get(op, "auto"))
        others = [one for one in _known()[op] if one.name != chosen.name]
        rows.append(
            Choice(
                op=op,
                chosen=chosen.name,
                why=chosen.why,
                also_known="; ".join(f"{one.name} ({_standing(one)})" for one in others) or "-",
            )
        )
    return rows


def _choose(op: str, wanted: str) -> Implementation:
    known = _known()
    assert op in known, f"no implementation of {op=} is registered, only of {sorted(known)}"
    by_name = {one.name: one for one in known[op]}
    if wanted == "auto":
        ranked = sorted(known[op], key=lambda one: -one.prefer)
        return next(one for one in ranked if one.prefer == 0 or one.unusable() is None)
    if wanted not in by_name:
        raise BackendError(f"{op} has no implementation {wanted!r}; known: {', '.join(by_name)}")
    reason = by_name[wanted].unusable()
    if reason is not None:
        raise BackendError(
            f"{op} was asked of {wanted}, which cannot be used: {reason}; 'auto' needs torch only"
        )
    return by_name[wanted]


def _standing(one: Implementation) -> str:
    return one.unusable() or one.why


@cache
def _known() -> dict[str, list[Implementation]]:
    for module in _MODULES:
        importlib.import_module(f"megatron.core.extensions.{module}")
    return _OPS
