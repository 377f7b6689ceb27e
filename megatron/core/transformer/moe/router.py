"""The router module: a learned gate in front of ``routing.topk_routing``, with its losses.

Product, scores, losses and probs are fp32 (or fp64) whatever the model's dtype: in bf16 a few
percent of tokens would go to other experts.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.core.param_role import Init, ParamRole, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.tensor_parallel.random import sequence_share
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.moe.expert_choice import (
    expert_choice_routing,
    takes_by_expert,
    token_choice_routing,
)
from megatron.core.transformer.moe.hash_routing import hash_map, ids_of_tokens
from megatron.core.transformer.moe.load_balancing import (
    MoEAuxLossAutoScaler,
    balance_loss_of_shares,
    router_entropy,
    router_z_loss,
    sequence_balance_loss,
    switch_load_balancing_loss,
)
from megatron.core.transformer.moe.microbatch_share import MicrobatchShare
from megatron.core.transformer.moe.quantile_balancing import expert_quantiles, quantile_choice
from megatron.core.transformer.moe.router_replay import (
    RouterReplay,
    RouterReplayAction,
    indices_of_map,
    map_of_indices,
)
from megatron.core.transformer.moe.routing import (
    Routing,
    ScoreFunction,
    best_experts,
    combine_weights,
    log_scores,
    map_of_largest,
)
from megatron.core.transformer.moe.sinkhorn import sinkhorn_ranking
from megatron.core.transformer.moe.wide_linear import wide_linear
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig

_LOSS_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}
"""Balancing type -> name of its loss in reports."""


class TopKRouter(nn.Module):
    """Route each token to its top-k experts; keeps nothing of a forward.

    In training the balance losses ride on ``probs`` (``MoEAuxLossAutoScaler``); each is a mean over
    the tokens of one microbatch, of which this rank may have a share, and
    ``context.aux_loss_scale`` makes the mean over those. How far balance is looked for
    (microbatch, sequence, all ranks) is in the counts.
    """

    weight: nn.Parameter
    """[num_experts, h]."""
    bias: nn.Parameter | None
    """[num_experts], part of the logits and trained like the weight."""
    expert_bias: Tensor | None
    """[num_experts], fp32 whatever the model's dtype; chooses experts, never weights them."""
    qb_beta: Tensor | None
    """The same, of quantile balancing: subtracted from logits."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Make the gate's weight, drawn by its role (see ``set_role``).

        Args:
            config: Number of experts, topk, order of softmax and top-k, losses, dtype.
            layer_number: Global index of the layer, under which metrics are recorded.
            pg_collection: The ranks of its ``tp_cp`` have equal shares of the tokens of each
                microbatch, those of ``tp_dp_cp`` the batch.
        """
        super().__init__()
        self.data_group = pg_collection.tp_dp_cp
        self.share = MicrobatchShare(pg_collection.tp_cp, pg_collection.cp.size())
        self.positions = sequence_share(pg_collection, sequence_parallel=True)
        config = config.for_layer(layer_number)
        assert config.num_moe_experts is not None, "a router needs num_moe_experts"
        self.layer_number = layer_number
        self.router_type = config.moe_router_type
        self.topk = config.moe_router_topk
        self.capacity_factor = config.moe_expert_capacity_factor
        self.score_function = config.moe_router_score_function
        self.pre_softmax = config.moe_router_pre_softmax
        self.scaling_factor = config.moe_router_topk_scaling_factor
        self.num_groups = config.moe_router_num_groups
        self.group_topk = config.moe_router_group_topk
        self.group_score_topk = config.moe_router_group_score_topk
        self.norm_topk_prob = config.moe_router_norm_topk_prob
        self.coeffs = dict(config.aux_loss_coeffs)
        if config.moe_z_loss_coeff:
            self.coeffs["z_loss"] = config.moe_z_loss_coeff
        self.dtype = torch.float64 if config.moe_router_dtype == "fp64" else torch.float32
        self.is_forced = config.moe_router_force_load_balancing
        self.forced_std = config.moe_router_force_biased
        self.jitter_eps = config.moe_input_jitter_eps
        self.bias_update_rate = config.moe_router_bias_update_rate
        bias = torch.zeros(config.num_moe_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.choice = config.moe_router_choice
        self.qb_ema = config.moe_router_quantile_balancing_ema
        is_quantile = self.choice == "quantile_balancing"
        beta = torch.zeros(config.num_moe_experts) if is_quantile else None
        self.register_buffer("qb_beta", beta)
        self.router_replay: RouterReplay | None = None
        if config.moe_enable_routing_replay:
            self.router_replay = RouterReplay(config.num_moe_experts, self.topk, register=True)
        weight = torch.empty(config.num_moe_experts, config.hidden_size, dtype=params_dtype(config))
        role = ParamRole(init=input_init(config), sums_over_tp=self.positions is not None)
        self.weight = set_role(nn.Parameter(weight), role)
        self.bias = None
        if config.moe_router_bias:
            zeros = nn.Parameter(torch.zeros(config.num_moe_experts, dtype=weight.dtype))
            self.bias = set_role(zeros, replace(role, init=Init(kind="zeros"), decays=False))

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Routing:
        """Route ``hidden_states`` [s, b, h], or the [num_tokens, h] of one sample.

        The routing's rows are the tokens in order: sample by sample for each position.
        Padding is routed too, but is in no loss and no count (``context.padding_mask``).
        The routing's probs carry the balance losses into backward. Counts, losses and entropy go
        to ``context.moe_metrics`` if there is one, without waiting for the device.
        """
        num_samples = hidden_states.shape[1] if hidden_states.dim() == 3 else 1
        logits = self.gating(self._input(hidden_states, context))
        if (self.is_forced or self.forced_std is not None) and self.training:
            logits = self._random(logits, num_samples, context)
        probs, routing_map = self._choose(logits, context)
        if not self.training and context.moe_metrics is None:
            return Routing(probs, routing_map)
        scores, padding = log_scores(logits, self.score_function), context.padding_rows()
        num_tokens = self.share.num_tokens(scores, padding)
        losses = self._losses(logits, scores, routing_map, num_samples, num_tokens, context)
        if self.training:
            for kind, coeff in self.coeffs.items():
                probs = self._attach(probs, losses[kind] * coeff, context)
        if context.moe_metrics is not None:
            context.moe_metrics.record(
                self.layer_number,
                context.microbatch,
                tokens_per_expert=_without_padding(routing_map, padding).sum(dim=0),
                expert_bias=self.expert_bias,
                entropy=router_entropy(scores, padding, num_tokens),
                **{_LOSS_NAMES[kind]: loss for kind, loss in losses.items()},
            )
        return Routing(probs, routing_map)

    def _choose(self, logits: Tensor, context: ForwardContext) -> Routing:
        """Choose the experts of each token, or take those that are replayed, and weigh them."""
        if self.router_type == "expert_choice":
            return self._choose_by_expert(logits, context)
        if self.qb_beta is not None and self.training and context.moe_metrics is not None:
            padding = self.share.gather_padding(context.padding_rows())
            every = self.share.gather(logits)
            context.moe_metrics.record_quantiles(
                self.layer_number,
                context.microbatch,
                expert_quantiles(every, self.topk, self.qb_beta, padding),
                len(every) if padding is None else (~padding).sum(),
            )
        replay = (context.router_replay or {}).get(self.layer_number, self.router_replay)
        replayed = None
        if replay is not None:
            replayed = replay.replayed(len(logits), context.microbatch, logits.device)
        if replayed is not None:
            routing_map = map_of_indices(replayed, logits.shape[1])
        else:
            routing_map = self._chosen(logits, context)
            if replay is not None and replay.action is RouterReplayAction.RECORD:
                replay.record(indices_of_map(routing_map, self.topk), context.microbatch)
        score_function, pre_softmax = self._weight_rule()
        probs = combine_weights(
            logits,
            routing_map,
            self.topk,
            score_function=score_function,
            pre_softmax=pre_softmax,
            norm_topk_prob=self.norm_topk_prob,
            scaling_factor=self.scaling_factor,
        )
        return Routing(probs, routing_map)

    def _choose_by_expert(self, logits: Tensor, context: ForwardContext) -> Routing:
        """Let experts choose in training; elsewhere tokens do, weighted alike."""
        if not takes_by_expert(self.training, context):
            return token_choice_routing(
                logits,
                self.topk,
                score_function=self.score_function,
                scaling_factor=self.scaling_factor,
            )
        return expert_choice_routing(
            logits,
            self.topk,
            capacity_factor=self.capacity_factor,
            score_function=self.score_function,
            scaling_factor=self.scaling_factor,
            padding=context.padding_rows(),
            share=self.share,
        )

    def _chosen(self, logits: Tensor, context: ForwardContext) -> Tensor:
        """Return the map of the experts that this router chooses by itself; no gradient."""
        if self.router_type == "hash":
            ids = ids_of_tokens(context.token_ids, len(logits))
            return hash_map(ids, logits.shape[1], self.topk, self.layer_number)
        if self.choice == "sinkhorn":
            # balance is for training; a text must not depend on its neighbours
            if not self.training:
                return map_of_largest(logits, self.topk)
            padding = self.share.gather_padding(context.padding_rows())
            ranking = self.share.own(sinkhorn_ranking(self.share.gather(logits), padding))
            return map_of_largest(ranking, self.topk)
        if self.qb_beta is not None:
            return quantile_choice(logits, self.topk, self.qb_beta)
        return best_experts(
            logits,
            self.topk,
            score_function=self.score_function,
            pre_softmax=self.pre_softmax,
            num_groups=self.num_groups,
            group_topk=self.group_topk,
            group_score_topk=self.group_score_topk,
            expert_bias=self.expert_bias,
        )

    def _weight_rule(self) -> tuple[ScoreFunction, bool]:
        """Return what makes weights of logits: the score function, and whether it sees all."""
        if self.choice != "sinkhorn":
            return self.score_function, self.pre_softmax
        return ("sigmoid", False) if self.topk == 1 else ("softmax", True)

    def gating(self, hidden_states: Tensor) -> Tensor:
        """Return the logits [num_tokens, num_experts] of ``hidden_states`` [num_tokens, h]."""
        dtype = torch.promote_types(hidden_states.dtype, self.dtype)
        logits = wide_linear(hidden_states, self.weight, dtype)
        return logits if self.bias is None else logits + self.bias.to(dtype)

    def _input(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Return what is multiplied by the gate, [num_tokens, h]."""
        if self.jitter_eps and context.rng is not None:
            wide = hidden_states.to(torch.promote_types(hidden_states.dtype, self.dtype))
            wide = wide if wide.dim() == 3 else wide.unsqueeze(1)  # [s, b, h]
            hidden_states = context.rng.jitter(
                wide,
                self.jitter_eps,
                layer=self.layer_number,
                site="router",
                batch_dim=1,
                share=self.positions,
            )
        return hidden_states.reshape(-1, hidden_states.shape[-1])

    def _random(self, logits: Tensor, num_samples: int, context: ForwardContext) -> Tensor:
        """Return random logits whose gradient goes to ``logits`` as it comes."""
        assert context.rng is not None, "forced routing needs a context with rng"
        shape = (logits.shape[0] // num_samples, num_samples, logits.shape[1])  # [s, b, E]
        drawn = context.rng.normal_like(
            logits.detach().view(shape),
            layer=self.layer_number,
            site="router",
            batch_dim=1,
            share=self.positions,
        )
        drawn = drawn.view_as(logits)
        if self.forced_std is not None:
            step = context.iteration if self.forced_std > 0 else None
            skew = context.rng.shared_normal(
                logits.shape[1], layer=self.layer_number, site="router_skew", step=step, like=drawn
            )
            drawn = drawn + skew * abs(self.forced_std)
        return drawn + (logits - logits.detach())

    def _losses(
        self,
        logits: Tensor,
        scores: Tensor,
        routing_map: Tensor,
        num_samples: int,
        num_tokens: int | Tensor,
        context: ForwardContext,
    ) -> dict[str, Tensor]:
        """Return name -> loss, without coefficients, of those in force.

        Each is this rank's part: the parts of all shares of the microbatch, of ``num_tokens`` in
        all, add up to the loss.
        """
        padding, mean_valid = context.padding_rows(), context.mean_valid_tokens
        mean_num = num_tokens if mean_valid is None else mean_valid.to(scores.dtype)
        losses = {}
        if "z_loss" in self.coeffs:
            losses["z_loss"] = router_z_loss(logits, padding, mean_num)
        if self.coeffs.keys() <= losses.keys():
            return losses
        best = routing_map
        if self.num_groups is not None or self.expert_bias is not None:
            best = map_of_largest(logits, self.topk)  # balance losses know no groups and no bias
        best = _without_padding(best, padding)
        counts = best.sum(dim=0)
        if "aux_loss" in self.coeffs:
            losses["aux_loss"] = switch_load_balancing_loss(
                scores, self.share.total(counts), self.topk, padding, num_tokens
            )
        if "seq_aux_loss" in self.coeffs:
            losses["seq_aux_loss"] = sequence_balance_loss(
                scores, best, self.topk, num_samples, padding, self.share
            )
        if "global_aux_loss" in self.coeffs and self.training:
            if context.moe_metrics is not None:
                counts = context.moe_metrics.counts_so_far(
                    self.layer_number, context.microbatch, counts
                )
            counts = all_reduce_sum(self.data_group, counts).to(scores.dtype)
            shares = counts / counts.sum().clamp(min=1.0)
            losses["global_aux_loss"] = balance_loss_of_shares(scores, shares, padding, mean_num)
        return losses

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """Move bias and prices where the weight goes, but never to its dtype."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(self.weight.device))
        return self

    @staticmethod
    def _attach(probs: Tensor, loss: Tensor, context: ForwardContext) -> Tensor:
        scale = context.aux_loss_scale * context.loss_scale
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, loss, scale)
        return attached


def _without_padding(routing_map: Tensor, padding: Tensor | None) -> Tensor:
    """Return the bool map [num_tokens, num_experts] without the rows that are padding."""
    return routing_map if padding is None else routing_map & ~padding.unsqueeze(1)
