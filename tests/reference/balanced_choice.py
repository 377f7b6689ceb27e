"""Sinkhorn and quantile balancing as plain loops over tokens and experts, in Python floats.

Nothing of megatron is used, so that the two can disagree.
"""

import math

from torch import Tensor


def sinkhorn_prices(logits: Tensor, tol: float, rounds: int) -> list[float]:
    """What each expert's column of exp(logits) is multiplied by, after alternate scaling."""
    table = [[math.exp(value) for value in row] for row in logits.tolist()]
    tokens, experts = range(len(table)), range(logits.shape[1])
    column = [1.0 for _ in experts]
    for _ in range(rounds):
        row = [1 / len(tokens) / sum(table[t][e] * column[e] for e in experts) for t in tokens]
        new = [1 / len(experts) / sum(table[t][e] * row[t] for t in tokens) for e in experts]
        moved = max(abs(math.log(new[e]) - math.log(column[e])) for e in experts)
        column = new
        if moved <= tol:
            break
    return column


def sinkhorn_chosen(logits: Tensor, topk: int, tol: float = 1e-4, rounds: int = 32) -> list:
    """The experts of each token, best first."""
    column = sinkhorn_prices(logits, tol, rounds)
    return [
        best([math.exp(value) * price for value, price in zip(row, column, strict=True)], topk)
        for row in logits.tolist()
    ]


def best(worth: list[float], count: int) -> list[int]:
    """Places of the largest, the lower first on a tie."""
    return sorted(range(len(worth)), key=lambda e: (-worth[e], e))[:count]


def quantile_chosen(logits: Tensor, topk: int, beta: list[float]) -> list[list[int]]:
    """The experts of each token under prices."""
    return [
        best([value - price for value, price in zip(row, beta, strict=True)], topk)
        for row in logits.tolist()
    ]


def quantiles(logits: Tensor, topk: int, beta: list[float]) -> list[float]:
    """The price of each expert that as many tokens as its share pay more than."""
    rows = logits.tolist()
    gains = []
    for row in rows:
        net = [value - price for value, price in zip(row, beta, strict=True)]
        cutoff = sorted(net, reverse=True)[topk]
        gains.append([value - cutoff for value in row])
    share = len(rows) * topk / len(beta)
    found = []
    for expert in range(len(beta)):
        bids = sorted((gain[expert] for gain in gains), reverse=True)
        bids.append(bids[-1])
        low = math.floor(share)
        found.append(bids[low] + (share - low) * (bids[low + 1] - bids[low]))
    return found
