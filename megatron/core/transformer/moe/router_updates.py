"""What a step moves in routers without a gradient: biases that choose experts, and prices."""

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.transformer.moe.load_balancing import updated_expert_bias
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.quantile_balancing import updated_beta
from megatron.core.transformer.moe.router import TopKRouter


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


@torch.no_grad()
def update_quantile_betas(
    model: nn.Module, metrics: MoEMetricsTracker, group: ProcessGroup
) -> None:
    """Move the prices of quantile balancing to what the step asked; see ``update_expert_biases``.

    A step without tokens leaves them.
    """
    routers = [m for m in model.modules() if isinstance(m, TopKRouter) and m.qb_beta is not None]
    if not routers:
        return
    quantiles = metrics.step_quantiles(group)
    for router in routers:
        beta = router.qb_beta
        assert beta is not None, "chosen because it has one"
        asked, num_tokens = quantiles[router.layer_number]
        new = updated_beta(beta, asked, router.qb_ema)
        beta.copy_(torch.where(num_tokens > 0, new, beta))
