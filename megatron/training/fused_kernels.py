"""Fused kernels of a run: those asked for must be possible on its device, all are announced."""

import torch

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.fused_on_cuda import Standing, standing
from megatron.training.config.fusion_rules import asked_fusions
from megatron.training.config.run_config import RunConfig


def check_asked(config: RunConfig, device: torch.device) -> None:
    """Refuse kernels that the user asked for and this device cannot run.

    Raises:
        ConfigError: It is no CUDA device.
    """
    asked = asked_fusions(config)
    if asked and device.type != "cuda":
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ConfigError(
            f"{flags} is for CUDA and this run is on {device.type}: no CUDA device was found; "
            "leave it out: it is used where it can be"
        )


def announced(config: RunConfig) -> list[Standing]:
    """Return the rows of the start-up banner: none for a model without experts."""
    return [] if config.model.num_moe_experts is None else standing(config.model)
