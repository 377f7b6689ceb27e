"""Balance losses, z-loss, entropy and counts over tokens that are no padding: one at a time.

Nothing of megatron is used. Samples are lists of tokens, padding is left out by ``if``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference.moe import ReferenceRule, full_scores, raw_scores, reference_routing


class PaddedFigures(NamedTuple):
    aux_loss: Tensor
    seq_aux_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    tokens_per_expert: list[int]


def padded_figures(
    logits: Tensor, padding: Tensor, rule: ReferenceRule, bias: Tensor | None = None
) -> PaddedFigures:
    """Compute all from ``logits`` [s, b, E] and ``padding`` [b, s], True for padding."""
    length, samples, num_experts = logits.shape
    plain = rule._replace(num_groups=1, group_topk=1)
    rows: list[list[Tensor]] = [[] for _ in range(samples)]  # of each sample, without padding
    counts = [0] * num_experts
    for sample in range(samples):
        for place in range(length):
            if padding[sample, place]:
                continue
            row = logits[place, sample]
            rows[sample].append(row)
            for expert in reference_routing(row[None], rule, bias)[1][0].tolist():
                counts[expert] += 1
    every = [row for sample in rows for row in sample]
    zero = logits.sum() * 0.0
    squares = [row.logsumexp(0) ** 2 for row in every]
    return PaddedFigures(
        aux_loss=balance(every, plain) if every else zero,
        seq_aux_loss=sum((balance(x, plain) for x in rows if x), zero) / samples,
        z_loss=sum(squares, zero) / max(len(every), 1),
        entropy=sum((_entropy(row, rule) for row in every), zero) / max(len(every), 1),
        tokens_per_expert=counts,
    )


def balance(rows: list[Tensor], rule: ReferenceRule) -> Tensor:
    """E * sum_i f_i P_i over ``rows``, one list entry [E] a token; experts without a bias."""
    logits = torch.stack(rows)
    chosen = reference_routing(logits, rule)[1]
    total = logits.new_zeros(())
    for expert in range(logits.shape[1]):
        share = (chosen == expert).sum() / chosen.numel()
        total = total + share * full_scores(logits, rule)[:, expert].mean()
    return logits.shape[1] * total


def _entropy(row: Tensor, rule: ReferenceRule) -> Tensor:
    scores = raw_scores(row[None], rule)[0]
    share = scores / scores.sum()
    return -(share * share.log()).sum()
