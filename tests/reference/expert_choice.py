"""Expert choice, one expert after another and one token after another; nothing of megatron."""

import math
from fractions import Fraction

import torch
from torch import Tensor


def taken_tokens(scores: Tensor, capacity: int) -> list[list[int]]:
    """For each expert the tokens it takes: best first, the earlier one among equals."""
    taken = []
    for expert in range(scores.shape[1]):
        column = scores[:, expert].tolist()
        order = sorted(range(len(column)), key=lambda token: (-column[token], token))
        taken.append(order[:capacity])
    return taken


def reference_capacity(num_tokens: int, num_experts: int, topk: int, factor: str = "1") -> int:
    """min(T, ceil(T k / E * F)), in whole numbers."""
    return min(num_tokens, math.ceil(Fraction(num_tokens * topk, num_experts) * Fraction(factor)))


def expert_choice_weights(
    logits: Tensor, capacity: int, score_function: str = "softmax", scaling: float = 1.0
) -> Tensor:
    """Weights [num_tokens, num_experts] of all pairs, 0 where an expert did not take the token."""
    weights = []
    if score_function == "softmax":
        scores = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    elif score_function == "sigmoid":
        scores = 1 / (1 + (-logits).exp())
    else:
        scores = logits.exp().log1p().sqrt()
    taken = taken_tokens(scores.detach(), capacity)
    for expert, tokens in enumerate(taken):
        mask = torch.zeros(len(logits), dtype=logits.dtype)
        mask[tokens] = 1.0
        weights.append(scores[:, expert] * mask * scaling)
    return torch.stack(weights, dim=1)


def token_choice_weights(logits: Tensor, topk: int) -> Tensor:
    """The same softmax weights where each token chooses its ``topk`` best experts."""
    scores = logits.softmax(dim=1)
    mask = torch.zeros_like(scores)
    for token, row in enumerate(scores.tolist()):
        mask[token, sorted(range(len(row)), key=lambda e: (-row[e], e))[:topk]] = 1.0
    return scores * mask
