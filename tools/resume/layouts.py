"""Which other layouts a checkpoint is resumed on: those that the user names, or near legal ones.

Whether a layout is legal say the rules that judge the user's own flags. Imports no torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from megatron.core.errors import ConfigError
from megatron.core.transformer.config.pipeline import PIPELINE_OPTIONS
from megatron.training.config.legal_layouts import (
    OPTION_OF_AXIS,
    Layout,
    layout_text,
    tilings,
)
from megatron.training.config.run_config import RunConfig
from tools.resume.settings import config_of

_MOST_TRIED = 40
"""Layouts that are tried in each search."""
_NEEDS_SEVERAL = {
    "tp": ("sequence_parallel",),
    "cp": ("cp_comm_type",),
    "ep": ("moe_dispatcher_node_size", "overlap_moe_expert_parallel_comm"),
}
"""Options that mean nothing where the axis has one rank."""


class Other(NamedTuple):
    """A layout to resume on."""

    text: str
    world_size: int
    values: dict[str, Any]
    """Options of it, and those of the user's run that must not follow the layout."""


class Asked(NamedTuple):
    """The user's own run."""

    words: Sequence[str]
    given: Mapping[str, Any]
    """Options that the user gave."""
    config: RunConfig
    """Resolved on the user's layout."""
    layout: Layout


def asked(words: Sequence[str], given: Mapping[str, Any], world_size: int) -> Asked:
    """Resolve the user's own run.

    Raises:
        ConfigError: See ``config_of``.
    """
    config = config_of(words, {}, world_size)
    sizes = {axis: given.get(name) for axis, name in OPTION_OF_AXIS.items()}
    whole = {axis: size or (None if axis == "etp" else 1) for axis, size in sizes.items()}
    return Asked(words, given, config, Layout(world_size, **whole))


def propose(own: Asked, max_ranks: int) -> list[Other]:
    """Return the nearest legal layouts on half and double the ranks, and with each axis changed."""
    world = own.layout.world_size
    searches: list[Callable[[Layout], bool]] = [
        lambda layout: layout.world_size < world,
        lambda layout: layout.world_size > world,
        *[_changes(own.layout, axis) for axis in ("ep", "tp", "pp", "cp")],
    ]
    found: list[Other] = []
    for wanted in searches:
        taken = {other.text for other in found}
        near = (_legal(own, layout) for layout in _around(own, max_ranks, wanted))
        new = (other for other in near if other is not None and other.text not in taken)
        found += islice(new, 1)
    return found


def parse(own: Asked, text: str) -> Other:
    """Read ``4,tp=2,ep=1``, ranks and sizes that are not the user's, or ``4``, the nearest legal.

    Raises:
        ConfigError: It cannot be read, or the rules refuse it.
    """
    ranks, *sizes = text.split(",")
    pairs = [size.partition("=") for size in sizes]
    wrong = [axis for axis, _, size in pairs if axis not in OPTION_OF_AXIS or not _is_size(size)]
    if wrong or not _is_size(ranks):
        raise ConfigError(
            f"--layouts {text}: write the number of ranks and then sizes of axes, such as "
            f"4,tp=2,ep=2; axes are {', '.join(OPTION_OF_AXIS)}"
        )
    if not sizes:
        near = tilings(own.layout._replace(world_size=int(ranks)), has_experts=_has_experts(own))
        for layout in islice(near, _MOST_TRIED):
            if (found := _legal(own, layout)) is not None:
                return found
    changed: dict[str, Any] = {axis: int(size) for axis, _, size in pairs}
    layout = own.layout._replace(world_size=int(ranks), **changed)
    if (found := _legal(own, layout)) is not None:
        return found
    problems = _problems(own, next(_variants(own, layout)), layout.world_size)
    raise ConfigError("".join([f"--layouts {text}:", *(f"\n  {problem}" for problem in problems)]))


def _has_experts(own: Asked) -> bool:
    return own.config.model.num_moe_experts is not None


def _is_size(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _changes(own: Layout, axis: str) -> Callable[[Layout], bool]:
    return lambda layout: (
        layout.world_size == own.world_size and getattr(layout, axis) != getattr(own, axis)
    )


def _around(own: Asked, max_ranks: int, wanted: Callable[[Layout], bool]) -> Iterator[Layout]:
    """Yield layouts on half, the same and double the ranks that are ``wanted``, nearest first."""
    world = own.layout.world_size
    for ranks in sorted({max(world // 2, 1), world, 2 * world}):
        if ranks <= max(max_ranks, world):
            near = tilings(own.layout._replace(world_size=ranks), has_experts=_has_experts(own))
            yield from islice(filter(wanted, near), _MOST_TRIED)


def _legal(own: Asked, layout: Layout) -> Other | None:
    for values in _variants(own, layout):
        if not _problems(own, values, layout.world_size):
            return Other(_text(own, layout), layout.world_size, values)
    return None


def _text(own: Asked, layout: Layout) -> str:
    ranks = f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
    return f"{ranks}, {layout_text(layout, own.layout)}"


def _variants(own: Asked, layout: Layout) -> Iterator[dict[str, Any]]:
    """Yield the options of a layout: as the user's flags are, then with what it may need."""
    values: dict[str, Any] = {
        name: size if size is None or size > 1 or axis == "etp" else None
        for axis, name in OPTION_OF_AXIS.items()
        for size in [getattr(layout, axis)]
    }
    if layout.pp != own.layout.pp:
        values |= dict.fromkeys(PIPELINE_OPTIONS)
    for axis, names in _NEEDS_SEVERAL.items():
        if getattr(layout, axis) == 1:
            values |= dict.fromkeys(names)
    values |= {
        # a balance loss is one of a microbatch: another size is another loss
        "micro_batch_size": own.config.training.micro_batch_size,
        "global_batch_size": own.config.training.global_batch_size,
        "padded_vocab_size": own.config.tokenizer.padded_vocab_size,
        "train_iters": own.config.training.train_iters,
    }
    yield values
    if layout.tp > 1:
        yield values | {"sequence_parallel": True}


def _problems(own: Asked, values: Mapping[str, Any], world_size: int) -> list[str]:
    try:
        config_of(own.words, values, world_size)
    except ConfigError as error:
        return list(error.problems)
    return []
