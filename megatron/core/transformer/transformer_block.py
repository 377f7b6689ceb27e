"""The stack of layers and the norm after the last."""

from dataclasses import dataclass

from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
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


class TransformerBlock(nn.Module):
    """All layers, each under its global index, so that parameter names are global."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerBlockSubmodules,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the layers and the final norm.

        Args:
            config: Of the model.
            submodules: What to build.
            pg_collection: Groups of this rank.
        """
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                str(number): build_module(
                    spec, config, layer_number=number, pg_collection=pg_collection
                )
                for number, spec in enumerate(submodules.layer_specs)
            }
        )
        self.spans = _spans(config, len(submodules.layer_specs))
        self.final_layernorm = build_module(submodules.layer_norm, config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Transform ``hidden_states`` [s, b, h]; see ``SelfAttention.forward`` for the rest."""
        for span, is_recomputed in self.spans:
            hidden_states = recomputed(
                self._through, is_recomputed, span, hidden_states, attention_mask, rotary, context
            )
        output: Tensor = self.final_layernorm(hidden_states)
        return output

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


def _spans(config: TransformerConfig, num_layers: int) -> list[tuple[range, bool]]:
    """Cut the layers into spans, each with whether it is recomputed in backward as a whole."""
    spans = [(span, True) for span in config.recomputed_spans(num_layers)]
    first_kept = spans[-1][0].stop if spans else 0
    return [*spans, (range(first_kept, num_layers), False)]
