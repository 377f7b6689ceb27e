"""From what was given to a complete ``RunConfig``: ranges, defaults, rules, in that order."""

from dataclasses import dataclass, field
from typing import Any

from megatron.core.errors import ConfigError
from megatron.training.config.checks import Check
from megatron.training.config.data_source import look_at_data
from megatron.training.config.defaults import derive
from megatron.training.config.flags import Given
from megatron.training.config.options import Option
from megatron.training.config.ranges import range_problems
from megatron.training.config.rules import find_problems, without_doubtful
from megatron.training.config.run_config import RunConfig

# what no default can stand for; the numbers only let the rules go on
_REQUIRED = {"num_layers": 2, "hidden_size": 256}


@dataclass
class _Merged:
    """All sources as one. Values that cannot be used are left out, and their flags doubtful."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)
    without_effect: set[str] = field(default_factory=set)


def resolve(
    sources: dict[str, Given],
    options: dict[str, Option],
    world_size: int,
    *,
    node_size: int | None = None,
) -> RunConfig:
    """Merge the sources, derive what is missing, and check everything.

    Args:
        sources: ``yaml`` and ``cli`` to what they say; later ones hold.
        options: The table of all options.
        world_size: Ranks of the run.
        node_size: Ranks of this node, where the launcher says it.

    Raises:
        ConfigError: Lists every problem of every source and rule.
    """
    if not all(given.readable for given in sources.values()):
        ConfigError.raise_if_any(
            problem for given in sources.values() for problem in given.problems
        )
    merged = _merge(sources, options)
    config = RunConfig.from_flat(
        merged.values, {name: merged.origins.get(name, "default") for name in options}
    )
    source = look_at_data(config.data, config.tokenizer)
    run = derive(config, options, world_size, source, node_size=node_size)
    check = Check(
        config=run.config,
        options=options,
        world_size=world_size,
        without_effect=frozenset(merged.without_effect),
    )
    found = [*find_problems(check), *source.problems, *run.problems]
    ConfigError.raise_if_any([*merged.problems, *without_doubtful(found, merged.doubtful)])
    run.config.notices = [*merged.notices, *run.notices]
    return run.config


def _merge(sources: dict[str, Given], options: dict[str, Option]) -> _Merged:
    merged = _Merged()
    for origin, given in sources.items():
        merged.notices += _overridden(merged.values, given.values, options)
        merged.values |= given.values
        merged.origins |= dict.fromkeys(given.values, origin)
        merged.problems += given.problems
        merged.notices += given.notices
        merged.doubtful |= given.doubtful
        merged.without_effect |= given.without_effect
    for name, sentence in list(range_problems(merged.values, options)):
        merged.problems.append(sentence)
        merged.doubtful.update(options[name].flags)
        del merged.values[name], merged.origins[name]
    for name, stand_in in _REQUIRED.items():
        if name not in merged.values:
            if options[name].flag not in merged.doubtful:
                merged.problems.append(f"{options[name].flag} is missing; every model needs it")
            merged.doubtful.update(options[name].flags)
            merged.values[name] = stand_in
    return merged


def _overridden(old: dict[str, Any], new: dict[str, Any], options: dict[str, Option]) -> list[str]:
    """Say which values of an earlier source another one replaces."""
    return [
        f"{options[name].show(new[name])} from the command line replaces "
        f"{options[name].text(old[name])} of --yaml-cfg"
        for name in new
        if name in old and old[name] != new[name]
    ]
