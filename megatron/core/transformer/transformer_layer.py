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

Branch = tuple[Tensor, Tensor | None]
"""Output [s, b, h] of attention or MLP, and a bias [h] not yet added, or None."""


@dataclass(frozen=True, kw_only=True)
class TransformerLayerSubmodules:
    """What fills the slots of a layer."""

    input_layernorm: ModuleSpec | type
    self_attention: ModuleSpec | type
    pre_mlp_layernorm: ModuleSpec | type | None
    """None where attention and MLP read the output of one norm (``ParallelTransformerLayer``)."""
    mlp: ModuleSpec | type
    """Dense or mixture of experts: anything that is built and called like ``MLP``."""
    post_self_attn_layernorm: ModuleSpec | type | None = None
    """Of what attention adds to the residual stream; None leaves it as it is."""
    post_mlp_layernorm: ModuleSpec | type | None = None
    """Of what the MLP adds; None leaves it as it is."""


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
        """Build the parts.

        Args:
            config: Of the model.
            submodules: What to build.
            layer_number: Global index of the layer, from 0.
            pg_collection: Groups of this rank.
        """
        super().__init__()
        self.layer_number = layer_number
        self.hidden_dropout, self.multiplier = config.hidden_dropout, config.residual_multiplier
        self.share = sequence_share(pg_collection, config.sequence_parallel)
        self.input_layernorm = build_module(submodules.input_layernorm, config, config.hidden_size)
        self.self_attention = build_module(
            submodules.self_attention,
            config,
            layer_number=layer_number,
            pg_collection=pg_collection,
        )
        self.post_self_attn_layernorm = _norm(submodules.post_self_attn_layernorm, config)
        self.pre_mlp_layernorm = _norm(submodules.pre_mlp_layernorm, config)
        self.mlp = build_module(
            submodules.mlp, config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.post_mlp_layernorm = _norm(submodules.post_mlp_layernorm, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Transform ``hidden_states`` [s, b, h]; see ``SelfAttention.forward`` for the rest."""
        return self._through_branches(hidden_states, attention_mask, rotary, context)

    def _through_branches(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, rotary, context
        )
        hidden_states = self._add_attention(attended, hidden_states, context)
        assert self.pre_mlp_layernorm is not None, "what the MLP reads is not attention's input"
        transformed = self.mlp(self.pre_mlp_layernorm(hidden_states), context)
        return self._add_mlp(transformed, hidden_states, context)

    def _add_attention(self, branch: Branch, residual: Tensor, context: ForwardContext) -> Tensor:
        norm = self.post_self_attn_layernorm
        return self._add(branch, residual, context, site="self_attention", norm=norm)

    def _add_mlp(self, branch: Branch, residual: Tensor, context: ForwardContext) -> Tensor:
        return self._add(branch, residual, context, site="mlp", norm=self.post_mlp_layernorm)

    def _add(
        self,
        branch: Branch,
        residual: Tensor,
        context: ForwardContext,
        *,
        site: str,
        norm: nn.Module | None,
    ) -> Tensor:
        if norm is not None:
            output, bias = branch
            branch = norm(output if bias is None else output + bias), None
        return bias_dropout_add(
            branch,
            residual,
            self.hidden_dropout,
            context,
            layer=self.layer_number,
            site=site,
            share=self.share,
            multiplier=self.multiplier,
        )


class ParallelTransformerLayer(TransformerLayer):
    """Layer whose attention and MLP both read its input; the sum of all three leaves it.

    Source: Wang and Komatsuzaki 2021 (GPT-J); a norm each: Black et al. 2022 (arXiv:2204.06745).
    """

    def _through_branches(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        for_mlp = normed
        if self.pre_mlp_layernorm is not None:
            for_mlp = self.pre_mlp_layernorm(hidden_states)
        attended = self.self_attention(normed, attention_mask, rotary, context)
        transformed = self.mlp(for_mlp, context)
        hidden_states = self._add_attention(attended, hidden_states, context)
        return self._add_mlp(transformed, hidden_states, context)


def _norm(spec: ModuleSpec | type | None, config: TransformerConfig) -> nn.Module | None:
    return None if spec is None else build_module(spec, config, config.hidden_size)
