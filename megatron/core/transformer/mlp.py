"""The dense MLP: one matrix, an activation, one matrix."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from megatron.core.param_role import GATED_PARTS
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init, output_init
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class MLPSubmodules:
    """What fills the slots of an MLP."""

    linear_fc1: ModuleSpec | type
    linear_fc2: ModuleSpec | type
    activation: Callable[[Tensor], Tensor]
    """From the output of linear_fc1 to the input of linear_fc2."""
    gated: bool
    """linear_fc1 is twice as wide as linear_fc2 reads: the activation halves it."""


class MLP(nn.Module):
    """h -> ffn -> h, for each token alone."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        ffn_size: int | None = None,
        shares_tokens: bool | None = None,
    ) -> None:
        """Build both matrices.

        Args:
            config: Widths, biases and initialisation.
            submodules: What to build.
            layer_number: Taken because every MLP slot is given it; a dense MLP needs it not.
            pg_collection: Its ``tp`` splits the width between the matrices.
            ffn_size: Width between the matrices; ``config.ffn_size`` when None.
            shares_tokens: Each rank of ``tp`` brings its share of the tokens and takes that of the
                outputs; ``config.sequence_parallel`` when None.
        """
        super().__init__()
        del layer_number
        hidden, dtype = config.hidden_size, params_dtype(config)
        ffn = ffn_size or config.ffn_size
        shared = config.sequence_parallel if shares_tokens is None else shares_tokens
        self.is_recomputed = "mlp" in config.recomputed_modules
        self.activation = submodules.activation
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            hidden,
            ffn * (2 if submodules.gated else 1),
            pg_collection=pg_collection,
            parts=(ffn, ffn) if submodules.gated else (ffn,),
            part_names=GATED_PARTS if submodules.gated else (),
            sequence_parallel=shared,
            init=input_init(config),
            dtype=dtype,
            bias=config.has_mlp_bias,
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2,
            ffn,
            hidden,
            pg_collection=pg_collection,
            sequence_parallel=shared,
            init=output_init(config),
            dtype=dtype,
            bias=config.has_mlp_bias,
        )

    def forward(
        self, hidden_states: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor | None]:
        """Apply to ``hidden_states`` [s, b, h].

        Returns:
            The output [s, b, h]; and the bias of linear_fc2 [h] if that was left to the caller.
        """
        del context  # for MLPs with a router
        return recomputed(self._transform, self.is_recomputed, hidden_states)

    def _transform(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(self.activated(hidden_states))
        return output

    def activated(self, hidden_states: Tensor) -> Tensor:
        """Return what linear_fc2 reads, [s, b, ffn], of ``hidden_states`` [s, b, h]."""
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        return self.activation(inner)
