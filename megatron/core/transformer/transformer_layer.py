"""One layer: norm, attention, add, norm, MLP or mixture of experts, add."""

from dataclasses import dataclass

from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import sequence_share
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.residual import bias_dropout_add
from megatron.core.transformer.rotary import RotaryTables
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class TransformerLayerSubmodules:
    """What fills the slots of a layer."""

    input_layernorm: ModuleSpec | type
    self_attention: ModuleSpec | type
    pre_mlp_layernorm: ModuleSpec | type
    mlp: ModuleSpec | type
    """Dense or mixture of experts: anything that is built and called like ``MLP``."""


class TransformerLayer(nn.Module):
    """Pre-norm layer: each branch reads a normalised copy of the residual stream and adds to it.

    Source: Xiong et al. 2020 (arXiv:2002.04745).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the four parts.

        Args:
            config: Of the model.
            submodules: What to build.
            layer_number: Global index of the layer, from 0.
            pg_collection: Groups of this rank.
        """
        super().__init__()
        self.layer_number = layer_number
        self.hidden_dropout = config.hidden_dropout
        self.share = sequence_share(pg_collection, config.sequence_parallel)
        self.input_layernorm = build_module(submodules.input_layernorm, config, config.hidden_size)
        self.self_attention = build_module(
            submodules.self_attention,
            config,
            layer_number=layer_number,
            pg_collection=pg_collection,
        )
        self.pre_mlp_layernorm = build_module(
            submodules.pre_mlp_layernorm, config, config.hidden_size
        )
        self.mlp = build_module(
            submodules.mlp, config, layer_number=layer_number, pg_collection=pg_collection
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Transform ``hidden_states`` [s, b, h]; see ``SelfAttention.forward`` for the rest."""
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, rotary, context
        )
        hidden_states = self._add(attended, hidden_states, context, "self_attention")
        transformed = self.mlp(self.pre_mlp_layernorm(hidden_states), context)
        return self._add(transformed, hidden_states, context, "mlp")

    def _add(
        self,
        branch: tuple[Tensor, Tensor | None],
        residual: Tensor,
        context: ForwardContext,
        site: str,
    ) -> Tensor:
        return bias_dropout_add(
            branch,
            residual,
            self.hidden_dropout,
            context,
            layer=self.layer_number,
            site=site,
            share=self.share,
        )
