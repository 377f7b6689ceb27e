"""From the user's flags to the runs of the proof: his options, but for what a run reads or writes.

Imports no torch, so that mistakes answer at once. Where to load from and save to, and when to end,
is the tool's; all else stays the user's, the schedule of the whole run above all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.errors import ConfigError
from megatron.training.config.flags import ACTIONS, Given, read_command_line
from megatron.training.config.options import Option, options_of
from megatron.training.config.resolve import resolve
from megatron.training.config.run_config import RunConfig
from megatron.training.config.yaml_file import read_yaml_file

_REPLACED = """
    save save_interval save_retain_interval keep_last save_hf
    non_persistent_save_interval non_persistent_ckpt_type
    non_persistent_global_ckpt_dir non_persistent_local_ckpt_dir
    load ckpt_step allow_fresh_start
    use_checkpoint_args use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args
    override_opt_param_scheduler use_checkpoint_opt_param_scheduler
    exit_interval exit_duration_in_mins
    log_interval log_dir tensorboard_dir
    moe_routing_trace_path moe_routing_trace_max_training_iters
"""
REPLACED = frozenset(_REPLACED.split())
"""Options whose place the tool takes, or that would write into the user's folders."""
_OF_SAVING = frozenset({"async_save"})
"""Options that are refused where nothing is saved."""
_PART_OF_A_RUN = {
    "no_save_optim": "a checkpoint without the optimizer cannot give back the unbroken run",
    "no_save_rng": "a checkpoint without the random state cannot give back the unbroken run",
    "no_load_optim": "a run with a fresh optimizer is not the unbroken run",
    "no_load_rng": "a run with another dropout stream is not the unbroken run",
    "finetune": "a run that begins anew is not the unbroken run",
    "moe_use_upcycling": "a run that upcycles begins anew; upcycle first, then prove",
    "skip_train": "nothing would be trained",
    "dry_run": "nothing would be trained",
}


@dataclass(kw_only=True)
class RecordPlan:
    """What one rank of a recorded run is told; plain JSON."""

    script: str
    """File with the user's functions."""
    words: list[str]
    """The user's flags."""
    values: dict[str, Any]
    """Options of the tool: field name -> value; None as if the user had not given it."""
    record: str
    """Folder to write into."""
    keep_loaded: bool = False
    """Keep the tensors before the first step."""
    keep_after: list[int] = field(default_factory=list)
    """Iterations after which tensors are kept."""


def config_of(words: Sequence[str], values: Mapping[str, Any], world_size: int) -> RunConfig:
    """Resolve the user's flags ``words`` with the tool's ``values`` in place of his.

    Args:
        words: The user's command line.
        values: See RecordPlan.
        world_size: Ranks of the run.

    Raises:
        ConfigError: Everything that is wrong, in the user's flags.
    """
    options = options_of(RunConfig)
    sources = _sources(words, options)
    for given in sources.values():
        for name in REPLACED | values.keys() | (set() if "save" in values else _OF_SAVING):
            given.values.pop(name, None)
    sources["cli"].values |= {name: value for name, value in values.items() if value is not None}
    return resolve(sources, options, world_size)


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """Return what the user gave, field name -> value, and refuse what makes a proof pointless.

    Raises:
        ConfigError: Unknown flags, values that cannot be read, flags without which nothing can be
            proved.
    """
    options = options_of(RunConfig)
    sources = _sources(words, options)
    values = {name: value for given in sources.values() for name, value in given.values.items()}
    problems = [problem for given in sources.values() for problem in given.problems]
    problems += [
        f"{options[name].flag}: {why}; leave it out"
        for name, why in _PART_OF_A_RUN.items()
        if values.get(name)
    ]
    problems += [
        f"{flag} is no part of training; leave it out"
        for flag in ACTIONS
        if flag in sources["cli"].actions and flag != "--yaml-cfg"
    ]
    ConfigError.raise_if_any(problems)
    return values


def left_out(values: Iterable[str]) -> list[str]:
    """Return the flags of ``values`` that the tool replaces."""
    options = options_of(RunConfig)
    return [options[name].flag for name in values if name in REPLACED]


def _sources(words: Sequence[str], options: dict[str, Option]) -> dict[str, Given]:
    given = read_command_line(words, options)
    if "--yaml-cfg" not in given.actions:
        return {"cli": given}
    path = Path(given.actions["--yaml-cfg"])
    return {"yaml": read_yaml_file(path, options), "cli": given}
