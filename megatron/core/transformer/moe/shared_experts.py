"""Shared experts: one dense MLP beside the routed experts, through which every token goes.

Several shared experts are one MLP as wide as all of them. Its parameters are dense: every data rank
holds them, whatever the expert parallelism; tensor-parallel ranks have slices, and gather tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.param_role import ParamRole, set_role
from megatron.core.tensor_parallel.linear_product import linear
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.precision import compute_dtype, params_dtype
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.transformer_config import TransformerConfig


class SharedExpertMLP(MLP):
    """``MLP(x)``, or ``sigmoid(w x) * MLP(x)`` with ``config.moe_shared_expert_gate``."""

    gate_weight: nn.Parameter | None
    """[1, h]."""

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, **options: Any
    ) -> None:
        """Build the matrices and the gate.

        Args:
            config: ``moe_shared_expert_intermediate_size`` and ``moe_shared_expert_gate``; else
                as in ``MLP``.
            submodules: See ``MLP``.
            options: See ``MLP``.
        """
        width = config.moe_shared_expert_intermediate_size
        assert width is not None, "shared experts need moe_shared_expert_intermediate_size"
        # a MoE layer gives each tensor-parallel rank its share of the tokens, in any case
        super().__init__(config, submodules, ffn_size=width, shares_tokens=True, **options)
        self.is_recomputed = "shared_experts" in config.recomputed_modules
        self.gate_weight = None
        if config.moe_shared_expert_gate:
            weight = torch.empty(1, config.hidden_size, dtype=params_dtype(config))
            role = ParamRole(
                init=input_init(config), sums_over_tp=config.tensor_model_parallel_size > 1
            )
            self.gate_weight = set_role(nn.Parameter(weight), role)

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> tuple[Tensor, None]:
        """Apply to ``hidden_states`` [num_tokens, h].

        Returns:
            The output [num_tokens, h]; and None, for no bias is left to add.
        """
        del context  # for MLPs with a router
        return recomputed(self._whole, self.is_recomputed, hidden_states), None

    def _whole(self, hidden_states: Tensor) -> Tensor:
        return self.finish(self.activated(hidden_states), hidden_states)

    def finish(self, activated: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the output of ``hidden_states`` whose ``activated`` is given."""
        output: Tensor
        output, bias = self.linear_fc2(activated)
        if bias is not None:
            output = output + bias
        if self.gate_weight is None:
            return output
        score = linear(hidden_states, self.gate_weight)  # [num_tokens, 1]
        return output * score.to(compute_dtype(score.dtype)).sigmoid().to(output.dtype)


class SharedExpertsMeanwhile:
    """Shared experts of one forward in two halves, each for one of the two ways of the rows.

    Pass ``first_half`` to what sends rows out and ``second_half`` to what brings them back.
    """

    def __init__(self, experts: SharedExpertMLP, hidden_states: Tensor) -> None:
        """Compute nothing yet for ``hidden_states`` [num_tokens, h]."""
        self._experts, self._hidden_states = experts, hidden_states
        self._activated: Tensor | None = None
        self._output: Tensor | None = None

    def first_half(self) -> None:
        """Compute the first matrix and the activation."""
        self._activated = self._experts.activated(self._hidden_states)

    def second_half(self) -> None:
        """Compute the second matrix and the gate."""
        assert self._activated is not None, "the first half comes first"
        self._output = self._experts.finish(self._activated, self._hidden_states)
        self._activated = None

    @property
    def output(self) -> Tensor:
        """[num_tokens, h]."""
        assert self._output is not None, "both halves come first"
        return self._output
