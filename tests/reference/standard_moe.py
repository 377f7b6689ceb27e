"""Experts as they are usually written, to compare what is kept for backward: autograd does all."""

import torch
from torch import Tensor, nn


def standard_experts(
    tokens: Tensor, probs: Tensor, routing_map: Tensor, weight1: Tensor, weight2: Tensor
) -> Tensor:
    """Return sum over chosen e of probs[e] * expert_e(token), [num_tokens, h], under SwiGLU.

    Rows are copied, go through both matrices, and the outputs are weighted and summed; so rows, the
    output of the first matrix, silu(gate), the activation and the outputs of the experts are kept.

    Args:
        tokens: [num_tokens, h].
        probs: [num_tokens, num_experts].
        routing_map: The same shape, bool.
        weight1: [num_experts, 2 * ffn, h], first gate, then up.
        weight2: [num_experts, h, ffn].
    """
    expert_of_row, token_of_row = routing_map.t().nonzero(as_tuple=True)
    rows = tokens[token_of_row]
    sizes = routing_map.sum(dim=0).tolist()
    inner = torch.cat([x @ w.t() for x, w in zip(rows.split(sizes), weight1, strict=True)])
    gate, up = inner.chunk(2, dim=1)
    active = nn.functional.silu(gate) * up
    out = torch.cat([x @ w.t() for x, w in zip(active.split(sizes), weight2, strict=True)])
    weighted = out * probs[token_of_row, expert_of_row].unsqueeze(1).to(out.dtype)
    return torch.zeros_like(tokens).index_add(0, token_of_row, weighted)
