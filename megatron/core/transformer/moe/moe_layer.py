"""The MoE layer: route, permute, compute, unpermute. Each part is a slot and knows no other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.errors import ConfigError
from megatron.core.lanes import Lanes
from megatron.core.param_role import role_of, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.flight import Meanwhile
from megatron.core.tensor_parallel.mappings import largest_over_ranks
from megatron.core.tensor_parallel.regions import gather_sequence, share_sequence
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init, output_init
from megatron.core.transformer.moe.capacity import (
    apply_router_token_dropping,
    dropped_fraction,
    get_capacity,
)
from megatron.core.transformer.moe.expert_choice import expert_capacity, takes_by_expert
from megatron.core.transformer.moe.fused_on_cuda import row_mover
from megatron.core.transformer.moe.microbatch_share import MicrobatchShare
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.routing import Routing
from megatron.core.transformer.moe.shared_experts import SharedExpertsMeanwhile
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.moe.token_dispatcher.base import During, local_expert_count
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.recompute import recomputed
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.weight_grad_queue import make_while_waiting

_PLAIN = ForwardContext()


@dataclass(frozen=True, kw_only=True)
class MoESubmodules:
    """What fills the slots of a MoE layer."""

    experts: ModuleSpec | type
    """Bank of experts, such as ``GroupedMLP``."""
    shared_experts: ModuleSpec | type | None = None
    """Such as ``SharedExpertMLP``; None for a layer without."""
    latent_proj: ModuleSpec | type | None = None
    """Matrix to the latent space and matrix back, such as ``Linear``; None for experts that work
    on tokens of full width."""
    router: ModuleSpec | type = TopKRouter
    """Returns a ``Routing``."""
    token_dispatcher: Callable[..., MoETokenDispatcher[Any]] = MoEAlltoAllTokenDispatcher
    """Class of the dispatcher."""


class MoELayer(nn.Module):
    """A mixture of experts in place of an MLP.

    ``output = sum over chosen experts e of probs[e] * expert_e(input)``, for each token, plus
    ``shared_experts(input)`` where there are any. With latent projections,
    ``output = back(sum of probs[e] * expert_e(there(input))) + shared_experts(input)``. No token is
    dropped unless there is a capacity, and never in generation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the parts.

        Args:
            config: Of the model.
            submodules: What to build.
            layer_number: Global index of the layer, from 0.
            pg_collection: Experts are spread over its ``ep``, and each over its ``expt_tp``.

        Raises:
            ConfigError: ``config`` contradicts itself; see ``TransformerConfig.check``.
        """
        super().__init__()
        config.check()
        config = config.for_layer(layer_number)
        assert config.num_moe_experts is not None, "a MoE layer needs num_moe_experts"
        self.config = config
        self.layer_number = layer_number
        self.expert_group, self.tp_group = pg_collection.tp_ep, pg_collection.tp
        self.share = MicrobatchShare(pg_collection.tp_cp, pg_collection.cp.size())
        self.is_recomputed = "moe" in config.recomputed_modules
        self.router = build_module(
            submodules.router, config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.token_dispatcher = submodules.token_dispatcher(
            config.num_moe_experts,
            pg_collection=pg_collection,
            topk=config.max_experts_per_token,
            exact=config.is_topk_exact,
            mover=row_mover(config),
        )
        self.experts = build_module(
            submodules.experts,
            local_expert_count(config.num_moe_experts, pg_collection.ep.size()),
            config,
            pg_collection=pg_collection,
        )
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if submodules.latent_proj is not None:
            self.fc1_latent_proj, self.fc2_latent_proj = _latent_projections(
                config, submodules.latent_proj
            )
        self.shared_experts = None
        if submodules.shared_experts is not None:
            self.shared_experts = build_module(
                submodules.shared_experts,
                config,
                layer_number=layer_number,
                pg_collection=pg_collection,
            )

    def forward(
        self,
        hidden_states: Tensor,
        context: ForwardContext = _PLAIN,
        *,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Apply to ``hidden_states`` [s, b, h], or to this rank's share of the sequence.

        Args:
            hidden_states: [s, b, h]; [s / tp, b, h] with sequence parallelism.
            context: Of the forward.
            padding_mask: [b, s] bool, True where a token is padding, as
                ``ForwardContext.padding_mask``, which it replaces; None leaves that as it is.

        Returns:
            The output [s, b, h], of padding too; and None, for no bias is left to add.
        """
        if padding_mask is not None:
            context = replace(context, padding_mask=padding_mask)
        whole = not self.config.sequence_parallel
        if whole:
            self._check_shares(hidden_states.shape[0])
            hidden_states = share_sequence(self.tp_group, hidden_states, sequence_parallel=True)
        context = _own_positions(context, self.tp_group)
        output = recomputed(self._mix, self.is_recomputed, hidden_states, context)
        return gather_sequence(self.tp_group, output) if whole else output, None

    def _check_shares(self, length: int) -> None:
        ranks = self.tp_group.size()
        ConfigError.raise_if_any(
            [
                f"a MoE layer shares {length} positions over --tensor-model-parallel-size {ranks}, "
                "which does not divide them; generate with a model of 1"
            ]
            if length % ranks
            else []
        )

    def _mix(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Route, send, compute and bring back: the layer itself."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [s*b, h]
        chosen = self.router(hidden_states, context)
        routing = self._limit(chosen, context)
        if context.router_tracer is not None:
            context.router_tracer.record_indices(
                self.layer_number, context.microbatch, routing.probs, chosen.routing_map
            )
        narrow = _project(self.fc1_latent_proj, tokens)
        each = self._rows_per_expert(len(tokens), context)
        if self.shared_experts is not None and self.config.moe_shared_expert_overlap:
            halves = SharedExpertsMeanwhile(self.shared_experts, tokens)
            there = _under(halves.first_half, context.lanes)
            back = _under(halves.second_half, context.lanes)
            combined = self._routed(narrow, *routing, (there, back), each)
            combined = _project(self.fc2_latent_proj, combined) + halves.output
            return combined.view(hidden_states.shape)
        meanwhile = (_under(None, context.lanes),) * 2
        if self.config.moe_expert_chunk_tokens is not None:
            size = self.config.moe_expert_chunk_tokens
            combined = self._in_chunks(narrow, routing, meanwhile, size)
        else:
            combined = self._routed(narrow, *routing, meanwhile, each)
        combined = _project(self.fc2_latent_proj, combined)
        if self.shared_experts is not None:
            shared, _ = self.shared_experts(tokens, context)
            combined = combined + shared
        return combined.view(hidden_states.shape)

    def _routed(
        self,
        tokens: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        meanwhile: tuple[During, During],
        rows_per_expert: int | None = None,
    ) -> Tensor:
        """Send ``tokens`` [num_tokens, moe_hidden_size] to their experts and sum what comes back.

        ``meanwhile`` is what to do on the way out, and on the way back.
        """
        sent = self.token_dispatcher.token_permutation(
            tokens, probs, routing_map, during=meanwhile[0], rows_per_expert=rows_per_expert
        )
        output, _ = self.experts(sent.hidden_states, sent.tokens_per_expert, sent.probs)
        return self.token_dispatcher.token_unpermutation(output, sent, during=meanwhile[1])

    def _in_chunks(
        self, tokens: Tensor, routing: Routing, meanwhile: tuple[During, During], size: int
    ) -> Tensor:
        """Do ``_routed`` for ``size`` tokens at a time, and again in backward.

        Every rank that shares the experts makes as many chunks as the one with most tokens, empty
        ones at last. One chunk is not recomputed: it is what there would be without.
        """
        wanted = -(-len(tokens) // size)
        count = max(1, largest_over_ranks(self.expert_group, wanted, tokens.device))
        sizes = [max(0, min(size, len(tokens) - start * size)) for start in range(count)]
        pieces = zip(*(x.split(sizes) for x in (tokens, *routing)), strict=True)
        outputs = [
            recomputed(self._routed, count > 1, x, p, m, meanwhile, None) for x, p, m in pieces
        ]
        return torch.cat(outputs)

    def _rows_per_expert(self, num_tokens: int, context: ForwardContext) -> int | None:
        """Rows that every expert gets from each rank, if that needs no exchange to be known."""
        config = self.config
        if self.share.ranks > 1 or (not context.same_num_tokens and self.expert_group.size() > 1):
            return None  # a capacity of the whole microbatch: any of it may be on any rank
        factor, num_experts = self._capacity_factor(context), self.token_dispatcher.num_experts
        if config.chooses_by_expert:
            if not takes_by_expert(self.router.training, context):
                return None
            return expert_capacity(num_tokens, num_experts, config.moe_router_topk, factor)
        if factor is None or not config.moe_pad_expert_input_to_capacity:
            return None
        pairs = num_tokens * config.moe_router_topk
        return min(num_tokens, get_capacity(pairs, num_experts, factor))

    def _capacity_factor(self, context: ForwardContext) -> float | None:
        """Generated text must not depend on its neighbours: there is no capacity then."""
        return self.config.moe_expert_capacity_factor if context.kv_cache is None else None

    def _limit(self, routing: Routing, context: ForwardContext) -> Routing:
        """Drop what is over the capacity."""
        factor = self._capacity_factor(context)
        if factor is None or self.config.chooses_by_expert:
            return routing
        is_whole = self.share.ranks == 1
        every = routing if is_whole else Routing(*map(self.share.gather, routing))
        limited = apply_router_token_dropping(
            *every,
            self.config.moe_router_topk,
            factor,
            self.config.moe_token_drop_policy,
            self.config.moe_pad_expert_input_to_capacity,
        )
        if context.moe_metrics is not None:
            padding = self.share.gather_padding(context.padding_rows())
            share = dropped_fraction(every.routing_map, limited.routing_map, padding)
            part = share / self.share.ranks  # parts of all shares add up
            context.moe_metrics.record_dropped(self.layer_number, context.microbatch, part)
        if is_whole:
            return limited
        kept = self.share.own(limited.routing_map)
        return Routing(routing.probs.masked_fill(~(kept & routing.routing_map), 0.0), kept)


def _under(compute: Callable[[], None] | None, lanes: Lanes | None) -> During:
    """Return what is done while rows travel: ``compute``, then what the other lane has to do."""
    steps = ([compute] if compute else []) + ([lanes.change] if lanes else [])
    if not steps:
        return None

    def forward() -> None:
        for step in steps:
            step()

    def backward() -> None:
        make_while_waiting()
        if lanes is not None:
            lanes.change()

    return Meanwhile(forward, backward)


def _own_positions(context: ForwardContext, tp: ProcessGroup) -> ForwardContext:
    """Return ``context`` with this rank's share of what is said of each position."""
    if tp.size() == 1:
        return context
    return replace(
        context,
        padding_mask=_own_columns(context.padding_mask, tp),
        token_ids=_own_columns(context.token_ids, tp),
    )


def _own_columns(x: Tensor | None, tp: ProcessGroup) -> Tensor | None:
    return None if x is None else x.chunk(tp.size(), dim=1)[tp.rank()]


def _latent_projections(
    config: TransformerConfig, spec: ModuleSpec | type
) -> tuple[nn.Module, nn.Module]:
    """Build the matrices from the width of a token to that of the experts, and back."""
    full, latent = config.hidden_size, config.moe_hidden_size
    options = {"dtype": params_dtype(config), "bias": config.add_bias_linear}
    pair = (
        build_module(spec, full, latent, init=input_init(config), **options),
        build_module(spec, latent, full, init=output_init(config), **options),
    )
    works_on_share = config.tensor_model_parallel_size > 1
    if works_on_share:
        for param in (*pair[0].parameters(), *pair[1].parameters()):
            set_role(param, replace(role_of(param), sums_over_tp=True))
    return pair


def _project(projection: nn.Module | None, tokens: Tensor) -> Tensor:
    """Apply ``projection`` to ``tokens`` [num_tokens, ...]; None changes nothing."""
    if projection is None:
        return tokens
    projected: Tensor = projection(tokens)[0]
    return projected
