"""Multi-head latent attention: keys and values of all heads are made from one vector a token.

The way down to the latents is computed by every tensor-parallel rank, on its share of the sequence
with sequence parallelism; the way up is split by heads. Easy to break: the rotated key of a token
is one, read by the heads of all ranks, so its gradient is a sum over them.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1; DeepSeek-V3 (arXiv:2412.19437), section 2.1.1.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.region_entry import RegionEntry, enter_region
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init, output_init
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.rotary import RotaryTables, rotate
from megatron.core.transformer.rotary_frequencies import yarn_mscale
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class MLASelfAttentionSubmodules:
    """What fills the slots of multi-head latent attention."""

    linear_q_proj: ModuleSpec | type
    """From hidden states to queries; without ``q_lora_rank``."""
    linear_q_down_proj: ModuleSpec | type
    """From hidden states to the latent of queries; with ``q_lora_rank``, as the next two."""
    q_layernorm: ModuleSpec | type
    linear_q_up_proj: ModuleSpec | type
    linear_kv_down_proj: ModuleSpec | type
    """From hidden states to the latent of keys and values, and the key that is rotated."""
    kv_layernorm: ModuleSpec | type
    linear_kv_up_proj: ModuleSpec | type
    core_attention: ModuleSpec | type
    linear_proj: ModuleSpec | type


class _Sizes(NamedTuple):
    """Channels of a head, and of the latent that keys and values are made from."""

    nope: int
    pe: int
    value: int
    latent: int


class MLASelfAttention(nn.Module):
    """Causal attention of each position to itself and earlier ones, through latents.

    With h a token, ``[c, p] = down(h)``, ``[k_i, v_i] = up_i(norm(c))`` for each head i and
    ``[q_i, r_i] = up_i(norm(down(h)))``, or of h itself, head i attends with the query
    ``[q_i, R r_i]``, the key ``[k_i, R p]`` and the value ``v_i``, R the rotation of the position.
    Both norms are always there. The ways down, and the way out, have biases; the ways up do not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the projections, the norms and the core.

        Args:
            config: Heads, widths, biases, initialisation.
            submodules: What to build.
            layer_number: Global index of the layer, from 0.
            pg_collection: Its ``tp`` splits the heads.
        """
        super().__init__()
        self.layer_number = layer_number
        self.sizes = _Sizes(
            config.qk_head_dim,
            config.qk_pos_emb_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
        )
        self.entry = RegionEntry(pg_collection.tp, config.sequence_parallel)
        build = _Build(config, pg_collection)
        heads, hidden = config.num_attention_heads, config.hidden_size
        query_size = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
        query_latent = config.query_latent_size
        self.has_query_latent = query_latent is not None
        if query_latent is None:
            self.linear_q_proj = build.up(submodules.linear_q_proj, hidden, query_size)
        else:
            down, up = submodules.linear_q_down_proj, submodules.linear_q_up_proj
            self.linear_q_down_proj = build.down(down, hidden, query_latent)
            self.q_layernorm = build_module(submodules.q_layernorm, config, query_latent)
            self.linear_q_up_proj = build.up(up, query_latent, query_size)
        latent, value_size = config.kv_lora_rank, heads * config.v_head_dim
        self.linear_kv_down_proj = build.down(
            submodules.linear_kv_down_proj, hidden, latent + config.qk_pos_emb_head_dim
        )
        self.kv_layernorm = build_module(submodules.kv_layernorm, config, latent)
        self.linear_kv_up_proj = build.up(
            submodules.linear_kv_up_proj, latent, heads * config.qk_head_dim + value_size
        )
        self.recomputes_up = "mla_up_proj" in config.recomputed_modules
        self.recomputes_core = "core_attn" in config.recomputed_modules and not self.recomputes_up
        self.core_attention = build_module(
            submodules.core_attention,
            config,
            layer_number=layer_number,
            pg_collection=pg_collection,
            softmax_scale=latent_softmax_scale(config),
        )
        self.linear_proj = build.out(submodules.linear_proj, value_size, hidden)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see ``SelfAttention.forward``. ``rotary`` is for qk_pos_emb_head_dim channels."""
        query_input = hidden_states
        if self.has_query_latent:
            query_input = self.q_layernorm(_product(self.linear_q_down_proj, hidden_states))
        compressed = _product(self.linear_kv_down_proj, hidden_states)
        latent, key_pe = compressed.split([self.sizes.latent, self.sizes.pe], dim=-1)
        latent = self.kv_layernorm(latent)
        attend = self._attend
        if context.kv_cache is not None and context.kv_cache.holds_latents:
            attend = self._attend_from_latents
        attended = recomputed(
            attend,
            self.recomputes_up,
            *(query_input, latent, key_pe, attention_mask, rotary, context),
        )
        output: tuple[Tensor, Tensor | None] = self.linear_proj(attended)
        return output

    def _attend(
        self,
        query_input: Tensor,
        latent: Tensor,
        key_pe: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Make queries, keys and values and attend.

        Args:
            query_input: What queries are made from, [s, b, q_lora_rank] or [s, b, h]; like the
                next two, this rank's share of the sequence with sequence parallelism.
            latent: [s, b, kv_lora_rank], normalised.
            key_pe: [s, b, qk_pos_emb_head_dim], not rotated yet.
            attention_mask: See ``forward``.
            rotary: See ``forward``.
            context: See ``forward``.

        Returns:
            [s, b, heads * v_head_dim], of this rank's heads and all of the sequence.
        """
        query_nope, query_pe = self._queries(query_input, rotary)
        up = _product(self.linear_kv_up_proj, latent)
        up = up.unflatten(-1, (-1, self.sizes.nope + self.sizes.value))  # [s, b, heads, k + v]
        key_nope, value = up.permute(1, 2, 0, 3).split([self.sizes.nope, self.sizes.value], dim=-1)
        key_pe = self._rotated_key(key_pe, rotary)  # [b, 1, s, pe]
        key_pe = key_pe.expand(-1, key_nope.shape[1], -1, -1)
        attended: Tensor = recomputed(
            self.core_attention,
            self.recomputes_core,
            torch.cat([query_nope, query_pe], dim=-1),
            torch.cat([key_nope, key_pe], dim=-1),
            value.contiguous(),
            attention_mask,
            context,
        )
        return attended

    def _attend_from_latents(
        self,
        query_input: Tensor,
        latent: Tensor,
        key_pe: Tensor,
        attention_mask: Tensor | None,
        rotary: RotaryTables | None,
        context: ForwardContext,
    ) -> Tensor:
        """Do as ``_attend`` with a cache that holds latents and rotated keys, see ``LatentCache``.

        The first positions attend with the keys and values made from them. Later ones multiply
        their queries by the way up to the keys, attend to the latents, which are keys and values
        of one group, and go up to the values with what they got: nothing is made anew of the past.
        """
        assert context.kv_cache is not None, "there is a cache"
        parts = [latent.transpose(0, 1).unsqueeze(1), self._rotated_key(key_pe, rotary)]
        cached = torch.cat(parts, dim=-1)  # [b, 1, s, latent + pe]
        if context.kv_cache.length == 0:
            context.kv_cache.append(self.layer_number, cached, cached[..., : self.sizes.latent])
            alone = replace(context, kv_cache=None)
            return self._attend(query_input, latent, key_pe, attention_mask, rotary, alone)
        query_nope, query_pe = self._queries(query_input, rotary)
        up = self.linear_kv_up_proj.weight.unflatten(0, (query_nope.shape[1], -1))
        to_key, to_value = up.split([self.sizes.nope, self.sizes.value], dim=1)
        query = torch.cat([query_nope @ to_key, query_pe], dim=-1)  # [b, heads, s, latent + pe]
        found: Tensor = self.core_attention(
            query, cached, cached[..., : self.sizes.latent], attention_mask, context
        )
        found = found.unflatten(-1, (-1, self.sizes.latent))  # [s, b, heads, latent]
        return torch.einsum("sbhl,hvl->sbhv", found, to_value).flatten(2)

    def _queries(self, query_input: Tensor, rotary: RotaryTables | None) -> tuple[Tensor, Tensor]:
        """Return the two parts of queries: [b, heads, s, nope] and, rotated, [b, heads, s, pe]."""
        up = self.linear_q_up_proj if self.has_query_latent else self.linear_q_proj
        query = _product(up, query_input)
        query = query.unflatten(-1, (-1, self.sizes.nope + self.sizes.pe))
        nope, pe = query.split([self.sizes.nope, self.sizes.pe], dim=-1)
        return nope.permute(1, 2, 0, 3), rotate(pe, rotary)

    def _rotated_key(self, key_pe: Tensor, rotary: RotaryTables | None) -> Tensor:
        """Return the key that all heads share, of all of the sequence, rotated: [b, 1, s, pe]."""
        return rotate(enter_region(self.entry, key_pe).unsqueeze(2), rotary)


def latent_softmax_scale(config: TransformerConfig) -> float:
    """Return what scores are multiplied by: ``softmax_scale``, or 1 / sqrt(size of a query).

    Under YaRN with ``mscale_all_dim`` that is made larger by the square of its factor, which is
    then not in the rotated channels alone but in all of them.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 3.1.4; YaRN (arXiv:2309.00071), eq. 22.
    """
    if config.softmax_scale is not None:
        return config.softmax_scale
    scale = float(config.head_dim**-0.5)
    if config.rope_scaling == "yarn" and config.mscale_all_dim:
        scale *= yarn_mscale(config.rope_factor, config.mscale_all_dim) ** 2
    return scale


class _Build(NamedTuple):
    """How the projections of one layer are built."""

    config: TransformerConfig
    pg_collection: ProcessGroupCollection

    @property
    def _options(self) -> dict[str, Any]:
        config = self.config
        return {"sequence_parallel": config.sequence_parallel, "dtype": params_dtype(config)}

    def down(self, spec: ModuleSpec | type, inputs: int, outputs: int) -> Any:
        """Build a projection to what all ranks have."""
        bias = self.config.add_bias_linear or self.config.add_qkv_bias
        init = input_init(self.config)
        return build_module(spec, inputs, outputs, init=init, bias=bias, **self._options)

    def up(self, spec: ModuleSpec | type, inputs: int, outputs: int) -> Any:
        """Build a projection to this rank's heads."""
        options = self._options | {"pg_collection": self.pg_collection}
        return build_module(
            spec, inputs, outputs, init=input_init(self.config), bias=False, **options
        )

    def out(self, spec: ModuleSpec | type, inputs: int, outputs: int) -> Any:
        """Build the projection from this rank's heads to the residual stream."""
        bias = self.config.add_bias_linear or self.config.add_proj_bias
        options = self._options | {"pg_collection": self.pg_collection}
        return build_module(
            spec, inputs, outputs, init=output_init(self.config), bias=bias, **options
        )


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    """Return what ``linear``, which adds its own bias, makes of ``x``."""
    out: Tensor = linear(x)[0]
    return out
