"""Checkpoints without tensors: what options can be taken from, made in a millisecond."""

import json
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import folders
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.training.arguments import parse_args
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import architecture, config_data, schedule
from megatron.training.tokenizer_facts import tokenizer_facts


def store_run(folder: Path, iteration: int, flags: str, *, world_size: int = 1) -> RunConfig:
    """Leave in ``folder`` what a run with ``flags`` would have, but for tensors."""
    config = parse_args(flags.split(), world_size=world_size)
    tokenizer = build_tokenizer(config.tokenizer)
    facts = tokenizer_facts(tokenizer)
    assert facts is not None
    files = {name: tokenizer.files[role] for role, name in facts["copies"].items()}
    common = {
        "iteration": iteration,
        "architecture": architecture(config.model),
        "schedule": schedule(config),
        "tokenizer": facts,
        "config": config_data(config),
    }
    store_facts(folder, iteration, common, files)
    return config


def store_facts(
    folder: Path, iteration: int, facts: dict[str, Any], files: dict[str, Path] | None = None
) -> None:
    """Publish a checkpoint that holds ``facts`` and copies of ``files``."""
    temporary = folders.begin(folder, iteration)
    for name, source in (files or {}).items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(source.read_bytes())
    (temporary / "common.json").write_text(json.dumps(facts))
    (temporary / folders.MANIFEST).write_text("{}")
    folders.publish(temporary, folder, iteration)
