"""The command line of a run -> a complete, checked ``RunConfig``. Imports no torch."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.config.checkpoint_args import checkpoint_given
from megatron.training.config.flags import Given, help_page, read_command_line
from megatron.training.config.options import options_of
from megatron.training.config.resolve import resolve
from megatron.training.config.run_config import RunConfig
from megatron.training.config.show import config_page
from megatron.training.config.yaml_file import read_yaml_file
from megatron.training.start_clock import start_clock


def parse_args(argv: Sequence[str] | None = None, *, world_size: int | None = None) -> RunConfig:
    """Read the command line and the YAML file it names, complete and check the options.

    ``--help``, ``--version`` and ``--print-config`` write to stdout and end the program.

    Args:
        argv: Words after the program's name; those of this process when None.
        world_size: Ranks of the run; torchrun's WORLD_SIZE, or 1, when None.

    Returns:
        Options with every size resolved, the source of each, and the notices to show.

    Raises:
        ConfigError: Lists everything that is wrong, in the user's flags.
    """
    options = options_of(RunConfig)
    given = read_command_line(sys.argv[1:] if argv is None else argv, options)
    if "--help" in given.actions:
        _write_and_exit(help_page(options))
    if "--version" in given.actions:
        _write_and_exit(f"megatron-moe {_version()}\n")
    sources = {"cli": given}
    if "--yaml-cfg" in given.actions:
        sources = {"yaml": read_yaml_file(Path(given.actions["--yaml-cfg"]), options), **sources}
    said = _merged(sources)
    if (stored := checkpoint_given(said, options)) is not None:
        sources = {"checkpoint": stored, **sources}
    ranks = _ranks(said) or (_world_size() if world_size is None else world_size)
    config = resolve(sources, options, ranks, node_size=_node_size())
    if "--print-config" in given.actions:
        _write_and_exit(config_page(config, options))
    start_clock.mark("options")
    return config


def core_transformer_config_from_args(args: RunConfig) -> TransformerConfig:
    """Return the model's part of the options, under Megatron-LM's name for users' scripts."""
    return args.model


def _merged(sources: dict[str, Given]) -> dict[str, Any]:
    return {name: value for given in sources.values() for name, value in given.values.items()}


def _ranks(values: dict[str, Any]) -> int | None:
    """Return the ranks that a dry run is about, where the user says so."""
    ranks = values.get("dry_run_world_size") if values.get("dry_run") else None
    return ranks if isinstance(ranks, int) and ranks > 0 else None  # else a rule says what is wrong


def _version() -> str:
    from importlib import metadata  # 15 modules, for --version alone

    try:
        return metadata.version("megatron-moe")
    except metadata.PackageNotFoundError:
        return "(not installed, run from a folder)"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _node_size() -> int | None:
    size = os.environ.get("LOCAL_WORLD_SIZE")
    return None if size is None else int(size)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _write_and_exit(page: str) -> NoReturn:
    if _rank() == 0:
        sys.stdout.write(page)
        sys.stdout.flush()
    raise SystemExit(0)
