"""Shared experts: one dense MLP beside the routed experts, through which every token goes.

Several shared experts are one MLP as wide as all of them. Its parameters are dense: every data rank
holds them, whatever the expert parallelism.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.param_role import ParamRole, set_role
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.precision import compute_dtype, params_dtype
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
        super().__init__(config, submodules, ffn_size=width, **options)
        self.gate_weight = None
        if config.moe_shared_expert_gate:
            weight = torch.empty(1, config.hidden_size, dtype=params_dtype(config))
            self.gate_weight = set_role(nn.Parameter(weight), ParamRole(init=input_init(config)))

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> tuple[Tensor, None]:
        """Apply to ``hidden_states`` [num_tokens, h].

        Returns:
            The output [num_tokens, h]; and None, for no bias is left to add.
        """
        output, bias = super().forward(hidden_states, context)
        if bias is not None:
            output = output + bias
        if self.gate_weight is None:
            return output, None
        score = nn.functional.linear(hidden_states, self.gate_weight)  # [num_tokens, 1]
        return output * score.to(compute_dtype(score.dtype)).sigmoid().to(output.dtype), None
