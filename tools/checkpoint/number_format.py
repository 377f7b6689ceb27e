"""From one number format of a model to another, where nothing is lost that training needs.

A bf16 run trains fp32 main weights and rounds them into the model. So from fp32 to bf16 the weights
become main weights, and back again, bit by bit; moments are fp32 in both.
"""

import copy
from collections.abc import Mapping

import torch

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.dist_checkpointing.tensor_shards import Storable
from megatron.core.errors import ConfigError
from megatron.training.config.run_config import RunConfig
from tools.checkpoint.keys import main_key, parts_of
from tools.checkpoint.rewrite import Made, copied

FORMATS = {"bf16": "bfloat16", "fp32": "float32"}


def config_in(config: RunConfig, target: str) -> RunConfig:
    """Return ``config`` in another number format, ``bf16`` or ``fp32``."""
    new = copy.deepcopy(config)
    new.model.bf16, new.model.fp64 = target == "bf16", False
    return new


def refuse_format(config: RunConfig, target: str, *, optim: bool) -> None:
    """Refuse what would lose something, or change nothing.

    Raises:
        ConfigError: With the reason.
    """
    name = config.model.params_dtype_name
    if name == FORMATS[target]:
        raise ConfigError(f"--dtype {target}: the model is in {name} already")
    if name not in ("float32", "bfloat16", "float64"):
        raise ConfigError(f"--dtype {target}: the model is in {name}, which is not offered here")
    if name == "float64" and optim:
        raise ConfigError(
            f"--dtype {target}: moments and weights in float64 would be rounded, and training on "
            "would be another run; --no-optim keeps the weights alone"
        )


def converted(
    source: StoredCheckpoint, in_format: Mapping[str, Storable], *, optim: bool
) -> dict[str, Made]:
    """Return the tensors in another number format.

    Args:
        source: To be converted.
        in_format: The model in the new format, key -> tensor; its dtypes count.
        optim: Keep the state of the optimizer.
    """
    made: dict[str, Made] = {}
    for key in source.keys:
        parts, facts = parts_of(key), source.facts(key)
        if parts.kind == "rng" or (parts.is_optimizer and optim and parts.kind != "main_param"):
            made[key] = copied(source, key)
        if parts.kind != "model":
            continue
        dtype = in_format[key].dtype
        main = main_key(key)
        made[key] = _cast(source, main if main in source.index else key, facts.shape, dtype)
        if optim and dtype == torch.bfloat16 != facts.dtype:
            made[main] = copied(source, key)
    return made


def _cast(source: StoredCheckpoint, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Made:
    return Made(TensorFacts(shape, dtype), lambda: source.read(key).to(dtype))
