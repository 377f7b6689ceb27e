"""From router logits to a routing decision: pure tensor functions, no module and no group.

Equal logits are broken by the lower expert index, on every device, so that a recomputed, resumed
or re-partitioned run routes alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    probs: Tensor
    """[num_tokens, num_experts], fp32 (fp64 from fp64 logits); 0 where a token is not routed."""
    routing_map: Tensor
    """[num_tokens, num_experts], bool; each row holds topk True."""


def topk_routing(logits: Tensor, topk: int, *, pre_softmax: bool = False) -> Routing:
    """Send each token to its ``topk`` best experts.

    Args:
        logits: [num_tokens, num_experts]; scored in fp32, or fp64 when they are.
        topk: Experts per token.
        pre_softmax: Take the softmax over all experts, not over the selected ones; the probs of
            a token then sum to at most 1.

    Returns:
        The routing; gradients reach ``logits`` through its probs.

    Source: Shazeer et al. 2017 (arXiv:1701.06538), eq. 3-5.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    indices = topk_indices(logits, topk)
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, indices, True)
    if pre_softmax:
        return Routing(softmax_over_experts(logits).masked_fill(~routing_map, 0.0), routing_map)
    selected = logits.masked_fill(~routing_map, float("-inf"))
    return Routing(softmax_over_experts(selected), routing_map)


def topk_indices(logits: Tensor, topk: int) -> Tensor:
    """Return the indices of the ``topk`` largest logits of each row, the lower index on a tie.

    ``torch.topk`` promises no order among equals. In fp32 each logit and its index become one
    integer, which has no equals and costs no more; other dtypes are sorted stably.

    Args:
        logits: [num_tokens, num_experts].
        topk: At most num_experts.

    Returns:
        [num_tokens, topk], int64, in no particular order.
    """
    logits = logits.detach()
    num_experts = logits.shape[1]
    if logits.dtype != torch.float32:
        return logits.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    # -0.0 equals 0.0 but has other bits; adding 0.0 makes them one.
    bits = (logits + 0.0).view(torch.int32).long()
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    place = torch.arange(num_experts - 1, -1, -1, device=logits.device)
    return (ordered * num_experts + place).topk(topk, dim=1, sorted=False).indices


def softmax_over_experts(logits: Tensor) -> Tensor:
    """Return the softmax over the last dimension of ``logits`` [num_tokens, num_experts].

    On the CPU a softmax over a few columns is several times slower than one over as many rows.
    """
    if logits.device.type == "cpu" and logits.shape[1] <= 32:
        return logits.t().softmax(dim=0).t().contiguous()
    return logits.softmax(dim=1)
