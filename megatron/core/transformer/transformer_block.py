"""The stack of layers and the norm after the last."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.stage_layers import StageLayers, whole_model
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.rotary import RotaryTables
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class TransformerBlockSubmodules:
    """What fills the slots of a block."""

    layer_specs: tuple[ModuleSpec, ...]
    """One for each layer of the model, by global index."""
    layer_norm: ModuleSpec | type
    """After the last layer."""
    mtp_layer: ModuleSpec | None = None
    """One depth of multi-token prediction; None for a model without."""


class TransformerBlock(nn.Module):
    """The layers of this rank, each under its global index, so that parameter names are global."""

    final_layernorm: nn.Module | None

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerBlockSubmodules,
        *,
        stages: Sequence[StageLayers] | None = None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the layers and, on the stage that has it, the final norm.

        Args:
            config: Of the model.
            submodules: What to build.
            stages: The pipeline stages of this rank; the whole model when None.
            pg_collection: Groups of this rank.
        """
        super().__init__()
        stages = stages or [whole_model(len(submodules.layer_specs))]
        self.layers = nn.ModuleDict(
            {
                str(number): build_module(
                    submodules.layer_specs[number],
                    config,
                    layer_number=number,
                    pg_collection=pg_collection,
                )
                for stage in stages
                for number in stage.layers
            }
        )
        self.spans = [_spans(config, stage.layers) for stage in stages]
        self.has_norm = [stage.final_norm for stage in stages]
        self.final_layernorm = None
        if any(self.has_norm):
            self.final_layernorm = build_module(submodules.layer_norm, config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Send ``hidden_states`` [s, b, h] through the layers of stage ``context.chunk``.

        See ``SelfAttention.forward`` for the other arguments.
        """
        for span, is_recomputed in self.spans[context.chunk]:
            hidden_states = recomputed(
                self._through, is_recomputed, span, hidden_states, attention_mask, rotary, context
            )
        if self.final_layernorm is not None and self.has_norm[context.chunk]:
            hidden_states = self.final_layernorm(hidden_states)
        return hidden_states

    def _through(
        self,
        span: range,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Go through the layers of ``span``."""
        for number in span:
            hidden_states = self.layers[str(number)](hidden_states, attention_mask, rotary, context)
        return hidden_states


def _spans(config: TransformerConfig, layers: range) -> list[tuple[range, bool]]:
    """Cut the layers of a stage into spans, each with whether backward recomputes it as a whole."""
    spans = [(layers[s.start : s.stop], True) for s in config.recomputed_spans(len(layers))]
    first_kept = spans[-1][0].stop if spans else layers.start
    return [*spans, (range(first_kept, layers.stop), False)]
