"""From what was given to a complete ``RunConfig``: ranges, defaults, rules, in that order."""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core.errors import ConfigError
from megatron.training.config.checkpoint_schedule import stored_schedule
from megatron.training.config.checks import Check
from megatron.training.config.data_source import look_at_data
from megatron.training.config.defaults import Derivation, derive
from megatron.training.config.flags import Given
from megatron.training.config.legal_layouts import (
    OPTION_OF_AXIS,
    Layout,
    advice,
)
from megatron.training.config.options import Option
from megatron.training.config.ranges import range_problems
from megatron.training.config.rules import find_problems, without_doubtful
from megatron.training.config.run_config import RunConfig

# what no default can stand for; the numbers only let the rules go on
_REQUIRED = {"num_layers": 2, "hidden_size": 256}

_SOURCES = {"checkpoint": "the checkpoint", "yaml": "--yaml-cfg", "cli": "the command line"}


@dataclass
class _Merged:
    """All sources as one. Values that cannot be used are left out, and their flags doubtful."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)
    without_effect: set[str] = field(default_factory=set)
    out_of_range: dict[str, Any] = field(default_factory=dict)

    def replaced(self, sizes: dict[str, Any], options: dict[str, Option]) -> "_Merged":
        """Return a copy in which the user had asked for ``sizes``; a default is as if not given."""
        given = {name: size for name, size in sizes.items() if size != options[name].default}
        values = {name: value for name, value in self.values.items() if name not in sizes} | given
        origins = {name: self.origins.get(name, "cli") for name in values}
        return replace(self, values=values, origins=origins)


def resolve(
    sources: dict[str, Given],
    options: dict[str, Option],
    world_size: int,
    *,
    node_size: int | None = None,
) -> RunConfig:
    """Merge the sources, derive what is missing, and check everything.

    Args:
        sources: ``checkpoint``, ``yaml`` and ``cli`` to what they say; later ones hold.
        options: The table of all options.
        world_size: Ranks of the run.
        node_size: Ranks of this node, where the launcher says it.

    Raises:
        ConfigError: Lists every problem of every source and rule, and where sizes of parallel axes
            do not fit, the nearest legal ones.
    """
    if not all(given.readable for given in sources.values()):
        ConfigError.raise_if_any(
            problem for given in sources.values() for problem in given.problems
        )
    merged = _merge(sources, options)
    config = _as_given(merged, options)
    source = look_at_data(config.data, config.tokenizer)
    source.schedule = stored_schedule(config.checkpoint)
    run = derive(config, options, world_size, source, node_size=node_size)
    found = [*_broken_rules(merged, run), *source.problems, *run.problems]
    problems = [*merged.problems, *without_doubtful(found, merged.doubtful)]
    if problems:
        ConfigError.raise_if_any(problems, _advice(merged, run))
    run.config.notices = [*merged.notices, *run.notices]
    return run.config


def _as_given(merged: _Merged, options: dict[str, Option]) -> RunConfig:
    sources = {name: merged.origins.get(name, "default") for name in options}
    return RunConfig.from_flat(merged.values, sources)


def _broken_rules(merged: _Merged, run: Derivation, *, looks_at_folders: bool = True) -> list[str]:
    check = Check(
        config=run.config,
        options=run.options,
        world_size=run.world_size,
        without_effect=frozenset(merged.without_effect),
    )
    return find_problems(check, looks_at_folders=looks_at_folders)


def _advice(merged: _Merged, run: Derivation) -> str | None:
    """Name the legal layouts nearest to the asked one, where the layout is at fault."""
    options = run.options
    sizes = {name for name in merged.out_of_range if name in OPTION_OF_AXIS.values()}
    if merged.doubtful - {flag for name in sizes for flag in options[name].flags}:
        return None  # who knows what model is meant

    def judge(layout: Layout) -> list[str]:
        tried = merged.replaced(layout.options(), options)
        nodes = run.node_size if layout.world_size == run.world_size else None
        world = layout.world_size
        other = derive(_as_given(tried, options), options, world, run.source, node_size=nodes)
        found = [*_broken_rules(tried, other, looks_at_folders=False), *other.problems]
        return without_doubtful(found, merged.doubtful)

    wanted = {
        axis: merged.values.get(name, options[name].default)
        for axis, name in OPTION_OF_AXIS.items()
    }
    problems = judge(Layout(run.world_size, **wanted))
    wanted |= {
        axis: merged.out_of_range[name] for axis, name in OPTION_OF_AXIS.items() if name in sizes
    }
    has_experts = run.config.model.num_moe_experts is not None
    return advice(Layout(run.world_size, **wanted), problems, judge, has_experts=has_experts)


def _merge(sources: dict[str, Given], options: dict[str, Option]) -> _Merged:
    merged = _Merged()
    for origin, given in sources.items():
        merged.notices += _overridden(merged, origin, given.values, options)
        merged.values |= given.values
        merged.origins |= dict.fromkeys(given.values, origin)
        merged.problems += given.problems
        merged.notices += given.notices
        merged.doubtful |= given.doubtful
        merged.without_effect |= given.without_effect
    for name, sentence in list(range_problems(merged.values, options)):
        merged.problems.append(sentence)
        merged.doubtful.update(options[name].flags)
        merged.out_of_range[name] = merged.values.pop(name)
        del merged.origins[name]
    start = merged.values.get("load") or merged.values.get("pretrained_checkpoint")
    way = f" (--use-checkpoint-args takes it from {start})" if start else ""
    for name, stand_in in _REQUIRED.items():
        if name not in merged.values:
            if options[name].flag not in merged.doubtful:
                merged.problems.append(
                    f"{options[name].flag} is missing; every model needs it{way}"
                )
            merged.doubtful.update(options[name].flags)
            merged.values[name] = stand_in
    return merged


def _overridden(
    merged: _Merged, origin: str, new: dict[str, Any], options: dict[str, Option]
) -> list[str]:
    """Say which values of an earlier source another one replaces."""
    old = merged.values
    return [
        f"{options[name].show(new[name])} from {_SOURCES[origin]} replaces "
        f"{options[name].text(old[name])} of {_SOURCES[merged.origins[name]]}"
        for name in new
        if name in old and old[name] != new[name]
    ]
