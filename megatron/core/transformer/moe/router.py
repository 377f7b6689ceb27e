"""The router module: a learned gate in front of ``routing.topk_routing``, with its losses.

Product, scores, losses and probs are fp32 (or fp64) whatever the model's dtype: in bf16 a few
percent of tokens would go to other experts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron.core.param_role import ParamRole, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.moe.load_balancing import (
    MoEAuxLossAutoScaler,
    balance_loss_of_shares,
    router_entropy,
    router_z_loss,
    sequence_balance_loss,
    switch_load_balancing_loss,
    updated_expert_bias,
)
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.routing import (
    Routing,
    log_scores,
    map_of_largest,
    topk_routing,
)
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig


class TopKRouter(nn.Module):
    """Route each token to its top-k experts; keeps nothing of a forward.

    In training the balance losses ride on ``probs`` (``MoEAuxLossAutoScaler``); each is a mean over
    the tokens of one microbatch on this rank, and ``context.aux_loss_scale`` makes the mean over
    those. How far balance is looked for (microbatch, sequence, all ranks) is in the counts.
    """

    weight: nn.Parameter
    """[num_experts, h]."""
    expert_bias: Tensor | None
    """[num_experts], fp32 whatever the model's dtype; chooses experts, never weights them."""

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
            pg_collection: Its ``dp_cp`` sums the counts of the global balance loss.
        """
        super().__init__()
        self.data_group = pg_collection.dp_cp
        assert config.num_moe_experts is not None, "a router needs num_moe_experts"
        self.layer_number = layer_number
        self.topk = config.moe_router_topk
        self.score_function = config.moe_router_score_function
        self.pre_softmax = config.moe_router_pre_softmax
        self.scaling_factor = config.moe_router_topk_scaling_factor
        self.num_groups = config.moe_router_num_groups
        self.group_topk = config.moe_router_group_topk
        self.coeffs = dict(config.aux_loss_coeffs)
        if config.moe_z_loss_coeff:
            self.coeffs["z_loss"] = config.moe_z_loss_coeff
        self.dtype = torch.float64 if config.moe_router_dtype == "fp64" else torch.float32
        self.is_forced = config.moe_router_force_load_balancing
        self.jitter_eps = config.moe_input_jitter_eps
        self.bias_update_rate = config.moe_router_bias_update_rate
        bias = torch.zeros(config.num_moe_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)
        weight = torch.empty(config.num_moe_experts, config.hidden_size, dtype=params_dtype(config))
        self.weight = set_role(nn.Parameter(weight), ParamRole(init=input_init(config)))

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Routing:
        """Route ``hidden_states`` [s, b, h], or the [num_tokens, h] of one sample.

        The routing's rows are the tokens in order: sample by sample for each position.
        The routing's probs carry the balance losses into backward. Counts, losses and entropy go
        to ``context.moe_metrics`` if there is one, without waiting for the device.
        """
        num_samples = hidden_states.shape[1] if hidden_states.dim() == 3 else 1
        logits = self.gating(self._input(hidden_states, context))
        if self.is_forced and self.training:
            logits = self._random(logits, num_samples, context)
        probs, routing_map = topk_routing(
            logits,
            self.topk,
            score_function=self.score_function,
            pre_softmax=self.pre_softmax,
            scaling_factor=self.scaling_factor,
            num_groups=self.num_groups,
            group_topk=self.group_topk,
            expert_bias=self.expert_bias,
        )
        scores = log_scores(logits, self.score_function)
        losses: dict[str, Tensor] = {}
        if self.training or context.moe_metrics is not None:
            losses = self._losses(logits, scores, routing_map, num_samples, context)
        if self.training:
            for kind, coeff in self.coeffs.items():
                probs = self._attach(probs, losses[kind] * coeff, context)
        if context.moe_metrics is not None:
            context.moe_metrics.record(
                self.layer_number,
                context.microbatch,
                tokens_per_expert=routing_map.sum(dim=0),
                load_balancing_loss=losses["aux_loss"].detach(),
                z_loss=_detached(losses.get("z_loss")),
                entropy=router_entropy(scores),
                seq_load_balancing_loss=_detached(losses.get("seq_aux_loss")),
                global_load_balancing_loss=_detached(losses.get("global_aux_loss")),
            )
        return Routing(probs, routing_map)

    def gating(self, hidden_states: Tensor) -> Tensor:
        """Return the logits [num_tokens, num_experts] of ``hidden_states`` [num_tokens, h]."""
        dtype = torch.promote_types(hidden_states.dtype, self.dtype)
        logits: Tensor = _WideLinear.apply(hidden_states, self.weight, dtype)
        return logits

    def _input(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Return what is multiplied by the gate, [num_tokens, h]."""
        if self.jitter_eps and context.rng is not None:
            wide = hidden_states.to(torch.promote_types(hidden_states.dtype, self.dtype))
            wide = wide if wide.dim() == 3 else wide.unsqueeze(1)  # [s, b, h]
            hidden_states = context.rng.jitter(
                wide, self.jitter_eps, layer=self.layer_number, site="router", batch_dim=1
            )
        return hidden_states.reshape(-1, hidden_states.shape[-1])

    def _random(self, logits: Tensor, num_samples: int, context: ForwardContext) -> Tensor:
        """Return random logits whose gradient goes to ``logits`` as it comes."""
        assert context.rng is not None, "--moe-router-force-load-balancing needs a context with rng"
        shape = (logits.shape[0] // num_samples, num_samples, logits.shape[1])  # [s, b, E]
        drawn = context.rng.normal_like(
            logits.detach().view(shape), layer=self.layer_number, site="router", batch_dim=1
        )
        return drawn.view_as(logits) + (logits - logits.detach())

    def _losses(
        self,
        logits: Tensor,
        scores: Tensor,
        routing_map: Tensor,
        num_samples: int,
        context: ForwardContext,
    ) -> dict[str, Tensor]:
        """Return name -> loss, without coefficients, of those in force and of aux_loss."""
        best = routing_map
        if self.num_groups is not None or self.expert_bias is not None:
            best = map_of_largest(logits, self.topk)  # balance losses know no groups and no bias
        counts = best.sum(dim=0)
        own = scores if "aux_loss" in self.coeffs else scores.detach()
        losses = {"aux_loss": switch_load_balancing_loss(own, counts, self.topk)}
        if "z_loss" in self.coeffs:
            losses["z_loss"] = router_z_loss(logits)
        if "seq_aux_loss" in self.coeffs:
            losses["seq_aux_loss"] = sequence_balance_loss(scores, best, self.topk, num_samples)
        if "global_aux_loss" in self.coeffs and self.training:
            if context.moe_metrics is not None:
                counts = context.moe_metrics.counts_so_far(
                    self.layer_number, context.microbatch, counts
                )
            counts = all_reduce_sum(self.data_group, counts).to(scores.dtype)
            shares = counts / counts.sum().clamp(min=1.0)
            losses["global_aux_loss"] = balance_loss_of_shares(scores, shares)
        return losses

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """Move the bias where the weight goes, but never to its dtype."""
        kept = self.expert_bias
        super()._apply(fn, recurse)
        if kept is not None:
            self.expert_bias = kept.to(self.weight.device)
        return self

    @staticmethod
    def _attach(probs: Tensor, loss: Tensor, context: ForwardContext) -> Tensor:
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, loss, context.aux_loss_scale)
        return attached


@torch.no_grad()
def update_expert_biases(model: nn.Module, metrics: MoEMetricsTracker, group: ProcessGroup) -> None:
    """Move every expert bias by what the step counted; once after each step that was made.

    Args:
        model: Its routers recorded into ``metrics``.
        metrics: With the slots of the step, before ``end_step``.
        group: The ranks whose tokens make the step; all of them call this.
    """
    routers = [
        m for m in model.modules() if isinstance(m, TopKRouter) and m.expert_bias is not None
    ]
    if not routers:
        return
    counts = metrics.step_counts(group)
    for router in routers:
        bias = router.expert_bias
        assert bias is not None, "chosen because it has one"
        bias.copy_(updated_expert_bias(bias, counts[router.layer_number], router.bias_update_rate))


def _detached(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else loss.detach()


class _WideLinear(torch.autograd.Function):
    """``input @ weight.T`` in a wider dtype, keeping only the narrow operands for backward.

    On a CPU some rows at a time are widened, so that the wide copy never leaves the cache.
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(input_, weight)
        ctx.dtype = dtype
        wide_weight = weight.to(dtype).t()
        out = input_.new_empty(len(input_), len(weight), dtype=dtype)
        for rows in _widened_at_once(input_, dtype):
            torch.mm(input_[rows].to(dtype), wide_weight, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        input_, weight = ctx.saved_tensors
        wide_weight = weight.to(ctx.dtype)
        grad_input = torch.empty_like(input_)
        grad_weight = torch.zeros_like(wide_weight)
        for rows in _widened_at_once(input_, ctx.dtype):
            grad_input[rows] = grad[rows] @ wide_weight
            grad_weight.addmm_(grad[rows].t(), input_[rows].to(ctx.dtype))
        return grad_input, grad_weight.to(weight.dtype), None


def _widened_at_once(input_: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yield blocks of rows of ``input_``; a single one where there is nothing to be gained."""
    num_rows = len(input_)
    is_blocked = input_.device.type == "cpu" and input_.dtype != dtype
    step = 256 if is_blocked else max(num_rows, 1)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
