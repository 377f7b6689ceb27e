"""Self-attention: one projection to queries, keys and values, the core, one projection back."""

from dataclasses import dataclass

from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.query_groups import QueryGroups
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init, output_init
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.rotary import RotaryTables, rotate, split_and_rotate
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class SelfAttentionSubmodules:
    """What fills the slots of self-attention."""

    linear_qkv: ModuleSpec | type
    core_attention: ModuleSpec | type
    linear_proj: ModuleSpec | type
    q_layernorm: ModuleSpec | type | None = None
    """Of queries before they are rotated; None leaves queries and keys as they are."""
    k_layernorm: ModuleSpec | type | None = None
    """Given with ``q_layernorm``."""


class SelfAttention(nn.Module):
    """Causal attention of each position to itself and earlier ones.

    Rows of linear_qkv.weight come group by group: the queries of the group, its key, its value.
    Groups are split over the tensor-parallel ranks, or shared by several (see ``QueryGroups``).

    Source: Vaswani et al. 2017 (arXiv:1706.03762); groups: Ainslie et al. 2023
    (arXiv:2305.13245); norms of queries and keys: Dehghani et al. 2023 (arXiv:2302.05442).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build both projections and the core.

        Args:
            config: Heads, groups, widths, biases, initialisation.
            submodules: What to build.
            layer_number: Global index of the layer, from 0.
            pg_collection: Its ``tp`` splits the heads.
        """
        super().__init__()
        heads, groups, head_dim = config.num_attention_heads, config.query_groups, config.head_dim
        self.query_groups = QueryGroups(
            pg_collection.tp, num_groups=groups, num_heads=heads, head_dim=head_dim
        )
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            (heads + 2 * groups) * head_dim,
            pg_collection=pg_collection,
            sequence_parallel=config.sequence_parallel,
            init=input_init(config),
            dtype=params_dtype(config),
            bias=config.add_bias_linear or config.add_qkv_bias,
        )
        self.q_layernorm = self.k_layernorm = None
        if submodules.q_layernorm is not None and submodules.k_layernorm is not None:
            self.q_layernorm = build_module(
                submodules.q_layernorm, config, num_heads=heads, pg_collection=pg_collection
            )
            self.k_layernorm = build_module(
                submodules.k_layernorm, config, num_heads=groups, pg_collection=pg_collection
            )
        self.recomputes_core = "core_attn" in config.recomputed_modules
        self.core_attention = build_module(
            submodules.core_attention,
            config,
            layer_number=layer_number,
            pg_collection=pg_collection,
        )
        may_split = isinstance(self.core_attention, DotProductAttention)
        self.may_be_one_pass = may_split and self.q_layernorm is None
        self.linear_proj = build_module(
            submodules.linear_proj,
            heads * head_dim,
            config.hidden_size,
            pg_collection=pg_collection,
            sequence_parallel=config.sequence_parallel,
            init=output_init(config),
            dtype=params_dtype(config),
            bias=config.add_bias_linear or config.add_proj_bias,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [s, b, h].
            attention_mask: bool [b, 1, s, positions], True where a query may *not* look, on top
                of causality; None forbids nothing more.
            rotary: Rotation of these positions; None rotates nothing.
            context: Of this forward.

        Returns:
            The output [s, b, h]; and the bias of linear_proj [h] if that was left to the caller.
        """
        mixed, bias = self.linear_qkv(hidden_states)
        if bias is not None:
            mixed = mixed + bias
        mixed = self.query_groups.attended(mixed)
        attended = None
        if self.may_be_one_pass:
            one_pass = self.core_attention.of_projection
            attended = recomputed(
                one_pass, self.recomputes_core, mixed, attention_mask, rotary, context
            )
        if attended is None:
            query, key, value = self._heads(mixed, rotary)
            attended = recomputed(  # [s, b, h]
                self.core_attention,
                self.recomputes_core,
                query,
                key,
                value,
                attention_mask,
                context,
            )
        output: tuple[Tensor, Tensor | None] = self.linear_proj(attended)
        return output

    def _heads(self, mixed: Tensor, rotary: RotaryTables | None) -> tuple[Tensor, Tensor, Tensor]:
        """Do what ``split_and_rotate`` does, with the norms in between."""
        if self.q_layernorm is None or self.k_layernorm is None:
            return split_and_rotate(mixed, rotary)
        query, key, value = mixed.split([mixed.shape[-2] - 2, 1, 1], dim=-2)
        return (
            rotate(self.q_layernorm(query), rotary),
            rotate(self.k_layernorm(key), rotary),
            rotate(value, None),
        )
