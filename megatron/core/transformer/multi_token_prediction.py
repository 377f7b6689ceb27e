"""Multi-token prediction: modules behind the last layer that predict tokens further ahead.

Only training runs them. Each depth reads the hidden states of the one before, so that the chain of
predictions is causal. Their losses are tied to the loss of the model, which alone is returned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ReplicatedLinear
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.moe.load_balancing import MoEAuxLossAutoScaler
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.rotary import RotaryTables
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

Head = Callable[[Tensor, Tensor], Tensor]
"""From hidden states [s, b, h] and labels [b, s] to the loss of each token [b, s]."""


@dataclass(frozen=True, kw_only=True)
class MultiTokenPredictionLayerSubmodules:
    """What fills the slots of one depth."""

    enorm: ModuleSpec | type
    """Of the embedding of the token ahead."""
    hnorm: ModuleSpec | type
    """Of the hidden states of the depth before."""
    transformer_layer: ModuleSpec
    final_layernorm: ModuleSpec | type
    """Before the output head and the next depth."""


class MultiTokenPredictionLayer(nn.Module):
    """One depth: h_k = norm(layer(eh_proj([enorm(embedding ahead); hnorm(h_(k-1))]))).

    The tensor-parallel ranks all hold the whole of ``eh_proj`` and each multiplies its tokens by
    it: under sequence parallelism nothing is sent for it, and its gradient is summed over them.

    Source: DeepSeek-AI 2024 (arXiv:2412.19437), section 2.2.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        *,
        depth: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the parts.

        Args:
            config: Of the model.
            submodules: What to build.
            depth: From 0; the layer counts on from those of the model.
            pg_collection: Groups of this rank.
        """
        super().__init__()
        hidden = config.hidden_size
        self.is_recomputed = config.recompute_granularity == "full"
        self.enorm = build_module(submodules.enorm, config, hidden)
        self.hnorm = build_module(submodules.hnorm, config, hidden)
        self.eh_proj = ReplicatedLinear(
            2 * hidden,
            hidden,
            sequence_parallel=config.sequence_parallel,
            init=input_init(config),
            dtype=params_dtype(config),
            bias=False,
        )
        self.transformer_layer = build_module(
            submodules.transformer_layer,
            config.of_last_layer(),
            layer_number=config.num_layers + depth,
            pg_collection=pg_collection,
        )
        self.final_layernorm = build_module(submodules.final_layernorm, config, hidden)

    def forward(
        self,
        embedded: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Return the hidden states of this depth, [s, b, h], normalised.

        Args:
            embedded: [s, b, h], of the tokens ahead.
            hidden_states: [s, b, h], of the depth before, normalised.
            attention_mask: See ``SelfAttention.forward``.
            rotary: See ``SelfAttention.forward``; of the positions themselves, not those ahead.
            context: Of this forward.
        """
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden_states)], dim=-1)
        joined, _ = self.eh_proj(both)
        hidden_states = recomputed(
            self.transformer_layer, self.is_recomputed, joined, attention_mask, rotary, context
        )
        output: Tensor = self.final_layernorm(hidden_states)
        return output


class MultiTokenPrediction(nn.Module):
    """All depths, one after another, under the output head of the model."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build ``config.mtp_num_layers`` depths of ``layer_spec``."""
        super().__init__()
        self.layers = nn.ModuleList(
            build_module(layer_spec, config, depth=depth, pg_collection=pg_collection)
            for depth in range(config.mtp_depths)
        )

    def forward(
        self,
        loss: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
        *,
        embedding: nn.Module,
        head: Head,
    ) -> Tensor:
        """Tie the losses of all depths, as ``context.ahead`` weighs them, to ``loss``.

        Args:
            loss: [b, s], of the model; returned as it is.
            hidden_states: [s, b, h], behind the last norm.
            attention_mask: See ``SelfAttention.forward``.
            rotary: See ``SelfAttention.forward``.
            context: Its ``ahead`` says what is read, and takes the sums of the losses.
            embedding: Of the model, or a copy: called with tokens and positions [b, s].
            head: Of the model.
        """
        ahead = context.ahead
        assert ahead is not None, "nothing is known of the tokens ahead"
        for depth, layer in enumerate(self.layers):
            read = ahead.at(depth)
            embedded = embedding(read.tokens, read.positions, context, site=f"embedding_{depth}")
            here = replace(context, token_ids=read.tokens)
            hidden_states = layer(embedded, hidden_states, attention_mask, rotary, here)
            loss_sum = (head(hidden_states, read.labels) * read.mask).sum()
            ahead.sums[depth] = loss_sum.detach()
            loss = MoEAuxLossAutoScaler.apply(loss, loss_sum, ahead.weights[depth])
        return loss
