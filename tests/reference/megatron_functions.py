"""Megatron's MoE functions as plain loops over tokens and experts. Nothing of megatron is used."""

import math

import torch
from torch import Tensor


def balance_loss(
    probs: Tensor, counts: list[int], total: int, topk: int, coeff: float, padding: list[bool]
) -> Tensor:
    """coeff * E / (topk T^2) * sum over experts of counts times sum over tokens of probs."""
    loss = probs.new_zeros(())
    for expert, count in enumerate(counts):
        for token in range(len(probs)):
            if not padding[token]:
                loss = loss + count * probs[token, expert]
    return loss * coeff * len(counts) / (topk * max(total, 1) ** 2)


def z_loss(logits: Tensor, coeff: float, padding: list[bool]) -> Tensor:
    """coeff * mean of (log of the sum of exponentials)^2 over tokens that are no padding."""
    kept = [row for row, pad in zip(logits, padding, strict=True) if not pad]
    if not kept:
        return logits.sum() * 0.0
    squares = [row.exp().sum().log() ** 2 for row in kept]
    return coeff * torch.stack(squares).mean()


def sinkhorn(cost: Tensor, steps: int) -> list[list[float]]:
    """Rows and columns scaled in turn, without logarithms: for small costs."""
    c = [[math.exp(v) for v in row] for row in cost.tolist()]
    rows, columns = len(c), len(c[0])
    d1 = [1.0] * columns
    for _ in range(steps):
        d0 = [1 / rows / sum(c[i][j] * d1[j] for j in range(columns)) for i in range(rows)]
        d1 = [1 / columns / sum(c[i][j] * d0[i] for i in range(rows)) for j in range(columns)]
    return [[c[i][j] * d0[i] * d1[j] for j in range(columns)] for i in range(rows)]


def best(row: list[float], count: int) -> list[int]:
    """Places of the largest, the largest first, the lower place among equals."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]


def best_in_groups(row: list[float], topk: int, num_groups: int, group_topk: int) -> list[int]:
    """Experts of the groups whose best topk / group_topk have the largest sum."""
    size = len(row) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    each = topk // group_topk
    sums = [sum(sorted((row[e] for e in group), reverse=True)[:each]) for group in groups]
    allowed = {e for g in best(sums, group_topk) for e in groups[g]}
    return best([v if e in allowed else -math.inf for e, v in enumerate(row)], topk)


def quantile_update(scores: Tensor, k: int, beta: list[float]) -> tuple[list[list[int]], list]:
    """Choices by scores - beta, and the new beta: a quantile of each column."""
    worth = [[s - b for s, b in zip(row, beta, strict=True)] for row in scores.tolist()]
    alpha = [sorted(row, reverse=True)[k] for row in worth]
    target = len(worth) * k / len(beta)
    low, new = math.floor(target), []
    for column in scores.t().tolist():
        gains = sorted((s - a for s, a in zip(column, alpha, strict=True)), reverse=True)
        high = gains[min(low + 1, len(gains) - 1)]
        new.append(gains[low] + (target - low) * (high - gains[low]))
    return [best(row, k) for row in worth], new


def rows_of(routing_map: Tensor, capacity: int | None = None) -> list[tuple[int, int]]:
    """(token, expert) of each row; with a capacity as many for each expert, filled up."""
    rows = []
    for expert in range(routing_map.shape[1]):
        routed = [t for t in range(len(routing_map)) if routing_map[t, expert]]
        others = [t for t in range(len(routing_map)) if not routing_map[t, expert]]
        taken = routed if capacity is None else (routed + others)[:capacity]
        rows += [(token, expert) for token in taken]
    return rows


def unpermute(rows: Tensor, places: list[tuple[int, int]], num_tokens: int, probs: Tensor | None):
    """Each token's rows, times their weights, summed."""
    out = [rows.new_zeros(rows.shape[1]) for _ in range(num_tokens)]
    for row, (token, expert) in zip(rows, places, strict=True):
        out[token] = out[token] + (row if probs is None else row * probs[token, expert])
    return torch.stack(out) if out else rows.new_zeros(0, rows.shape[1])


def padded_map(routing_map: Tensor, multiple: int) -> Tensor:
    """The first tokens that are not routed are, until each count is a multiple."""
    out = routing_map.clone()
    for expert in range(out.shape[1]):
        for token in range(len(out)):
            if int(out[:, expert].sum()) % multiple and not out[token, expert]:
                out[token, expert] = True
    return out
