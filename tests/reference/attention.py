"""Attention written out: one sample, one head, one query at a time."""

from collections.abc import Callable

import torch
from torch import Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Return softmax(q . k / sqrt(d)) v of one query [d] over [n, d], skipping ``hidden`` [n]."""
    seen = [j for j in range(len(keys)) if not hidden[j]]
    scores = torch.stack([query @ keys[j] / len(query) ** 0.5 for j in seen])
    weights = scores.softmax(dim=0)
    return sum(weights[n] * values[j] for n, j in enumerate(seen))


def self_attention(
    x: Tensor,
    weights: dict[str, Tensor],
    *,
    heads: int,
    groups: int,
    mask: Tensor | None = None,
    rotate: Callable[[Tensor, int], Tensor] | None = None,
    norm_qk: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Causal self-attention of one sequence.

    Args:
        x: [s, h].
        weights: ``linear_qkv.weight``, ``linear_proj.weight`` and perhaps their biases.
        heads: Query heads.
        groups: Key-value heads.
        mask: bool [s, s], True where a query may not look.
        rotate: Rotates one head [d] of one position.
        norm_qk: Of all queries [s, heads, d] and all keys [s, groups, d], before rotation.

    Returns:
        [s, h].
    """
    s = len(x)
    per_group = heads // groups
    mixed = _linear(x, weights, "linear_qkv").view(s, groups, per_group + 2, -1)
    queries = mixed[:, :, :per_group].flatten(1, 2)  # [s, heads, d]
    all_keys = mixed[:, :, per_group]  # [s, groups, d]
    if norm_qk is not None:
        queries, all_keys = norm_qk(queries, all_keys)
    results = []
    for t in range(s):
        row = []
        hidden = torch.zeros(t + 1, dtype=torch.bool) if mask is None else mask[t, : t + 1]
        for head in range(heads):
            group = head // per_group
            query = queries[t, head]
            keys = [all_keys[j, group] for j in range(t + 1)]
            values = torch.stack([mixed[j, group, per_group + 1] for j in range(t + 1)])
            if rotate is not None:
                query = rotate(query, t)
                keys = [rotate(key, j) for j, key in enumerate(keys)]
            row.append(attend(query, torch.stack(keys), values, hidden))
        results.append(torch.cat(row))
    return _linear(torch.stack(results), weights, "linear_proj")


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out
