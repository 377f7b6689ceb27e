"""The weights of our model under Mixtral's names, by the project's own converter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import MODEL, model_tensors
from megatron.core.models.huggingface.exchange import hf_tensor
from megatron.core.models.huggingface.options import hf_config_of
from megatron.core.models.huggingface.weight_plan import weight_plan
from megatron.training.huggingface_family import fitting_family, options_of_checkpoint
from tools.bench.step_ours import Step


@dataclass(frozen=True)
class MixtralWeights:
    """Copies of all weights, by their names in a checkpoint of Mixtral, and its config.json."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, ours: Step) -> "MixtralWeights":
        """Convert the weights that a step of ours has now.

        Raises:
            ConfigError: A Mixtral computes something else.
        """
        run = ours.run
        options = options_of_checkpoint(run.config, run.padded_vocab_size)
        family = fitting_family(run.config, options, ["mixtral"])
        plan = weight_plan(family, options)
        stored = {key.removeprefix(MODEL): t for key, t in model_tensors(ours.ddp.module).items()}
        dtype = next(ours.ddp.parameters()).dtype

        def read(key: str) -> Tensor:
            tensor = stored[key]
            assert isinstance(tensor, Tensor), f"{key} is cut over ranks"
            return tensor

        tensors = {key: hf_tensor(plan, key, dtype, read) for key in plan.hf_shapes}
        return cls(hf_config_of(options, family), tensors, dtype)

    @property
    def num_layers(self) -> int:
        """Layers, all of them with experts."""
        return int(self.config["num_hidden_layers"])

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return int(self.config["num_local_experts"])

    def gate_name(self, layer: int) -> str:
        """Return the name of the router's weight."""
        return f"model.layers.{layer}.block_sparse_moe.gate.weight"

    def expert(self, layer: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate, up [ffn, h] and down [h, ffn] of one expert."""
        name = f"model.layers.{layer}.block_sparse_moe.experts.{number}."
        gate, down, up = (self.tensors[f"{name}w{which}.weight"] for which in (1, 2, 3))
        return gate, up, down

    def experts(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return gate and up [E, 2 * ffn, h], and down [E, h, ffn], of all experts."""
        found = [self.expert(layer, number) for number in range(self.num_experts)]
        return (
            torch.stack([torch.cat((gate, up)) for gate, up, _ in found]),
            torch.stack([down for _, _, down in found]),
        )
