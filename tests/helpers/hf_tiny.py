"""Folders of Hugging Face's made of plans alone: random numbers, no transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.family import family_of
from megatron.core.models.huggingface.options import model_options
from megatron.core.models.huggingface.weight_plan import WeightPlan, weight_plan
from tests.helpers.hf_cases import CASES

BUILT = [name for name in CASES if name != "smollm3"]
"""Cases that are not refused; layers without positions are."""


def options_of(name: str) -> dict[str, Any]:
    """Return the options of a case; a test of a feature that is not here yet is skipped."""
    try:
        return model_options(CASES[name].config)
    except ConfigError as error:
        if all("which this version does not have" in problem for problem in error.problems):
            pytest.skip(str(error))
        raise


def plan_of(name: str) -> WeightPlan:
    """Return the plan of the weights of a case."""
    return weight_plan(family_of(CASES[name].config), options_of(name))


def random_tensors(plan: WeightPlan, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a tensor for every name on disk, all numbers different in seed and place."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: torch.randn(shape, generator=generator).to(dtype)
        for key, shape in plan.hf_shapes.items()
    }


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write config.json and one file of tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a case with random weights."""
    return write_folder(folder, CASES[name].config, random_tensors(plan_of(name), dtype))
