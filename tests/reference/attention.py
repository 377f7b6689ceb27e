"""Attention written out: one sample, one head, one query at a time."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Return weights(scale * q . k) v of one query [d] over [n, d], skipping ``hidden`` [n].

    Args:
        query: [d].
        keys: [n, d].
        values: [n, dv].
        hidden: bool [n], True where the query may not look.
        scale: 1 / sqrt(d) when None.
        softcap: c of c tanh(score / c).
        sink: [], one more logit, which no value belongs to.
        factor: [n], what dropout multiplies weights by.
    """
    scale = len(query) ** -0.5 if scale is None else scale
    seen = [j for j in range(len(keys)) if not hidden[j]]
    scores = torch.stack([query @ keys[j] * scale for j in seen])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sink is not None:
        scores = torch.cat([scores, sink[None]])
    weights = scores.softmax(dim=0)
    if factor is not None:
        weights = torch.stack([weights[n] * factor[j] for n, j in enumerate(seen)])
    return sum(weights[n] * values[j] for n, j in enumerate(seen))


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    factor: Tensor | None = None,
    **more: float | None,
) -> Tensor:
    """Attend from each of the last positions to itself, and the ``window`` positions before it.

    Args:
        query: [b, heads, s, d].
        key: [b, groups, positions, d].
        value: [b, groups, positions, dv].
        window: All earlier positions when None.
        sinks: [heads].
        mask: bool [b, 1, s, positions], True where a query may not look.
        factor: [b, heads, s, positions] of dropout.
        more: ``scale`` and ``softcap`` of ``attend``.

    Returns:
        [b, heads, s, dv].
    """
    (samples, heads, s, _), (groups, positions) = query.shape, key.shape[1:3]
    rows = []
    for b, head, t in itertools.product(range(samples), range(heads), range(s)):
        place, group = positions - s + t, head // (heads // groups)
        hidden = torch.tensor(
            [j > place or (window is not None and j < place - window) for j in range(positions)]
        )
        if mask is not None:
            hidden = hidden | mask[b, 0, t]
        rows.append(
            attend(
                query[b, head, t],
                key[b, group],
                value[b, group],
                hidden,
                sink=None if sinks is None else sinks[head],
                factor=None if factor is None else factor[b, head, t],
                **more,
            )
        )
    return torch.stack(rows).view(samples, heads, s, -1)


def self_attention(
    x: Tensor,
    weights: dict[str, Tensor],
    *,
    heads: int,
    groups: int,
    mask: Tensor | None = None,
    rotate: Callable[[Tensor, int], Tensor] | None = None,
    norm_qk: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    window: int | None = None,
    **more: float | None,
) -> Tensor:
    """Causal self-attention of one sequence.

    Args:
        x: [s, h].
        weights: ``linear_qkv.weight``, ``linear_proj.weight`` and perhaps their biases, and
            ``core_attention.softmax_offset``, the sinks.
        heads: Query heads.
        groups: Key-value heads.
        mask: bool [s, s], True where a query may not look.
        rotate: Rotates one head [d] of one position.
        norm_qk: Of all queries [s, heads, d] and all keys [s, groups, d], before rotation.
        window: Positions that a query sees before its own; all when None.
        more: ``scale`` and ``softcap`` of ``attend``, and ``sink`` of all heads, which a learnt one
            replaces.

    Returns:
        [s, h].
    """
    s, sinks = len(x), weights.get("core_attention.softmax_offset")
    per_group = heads // groups
    mixed = _linear(x, weights, "linear_qkv").view(s, groups, per_group + 2, -1)
    queries = mixed[:, :, :per_group].flatten(1, 2)  # [s, heads, d]
    all_keys = mixed[:, :, per_group]  # [s, groups, d]
    if norm_qk is not None:
        queries, all_keys = norm_qk(queries, all_keys)
    results = []
    for t in range(s):
        row = []
        hidden = torch.zeros(t + 1, dtype=torch.bool) if mask is None else mask[t, : t + 1].clone()
        if window is not None:
            hidden[: max(0, t - window)] = True
        for head in range(heads):
            group = head // per_group
            query = queries[t, head]
            keys = [all_keys[j, group] for j in range(t + 1)]
            values = torch.stack([mixed[j, group, per_group + 1] for j in range(t + 1)])
            if rotate is not None:
                query = rotate(query, t)
                keys = [rotate(key, j) for j, key in enumerate(keys)]
            if sinks is not None:
                more["sink"] = sinks[head]
            row.append(attend(query, torch.stack(keys), values, hidden, **more))
        results.append(torch.cat(row))
    return _linear(torch.stack(results), weights, "linear_proj")


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out
