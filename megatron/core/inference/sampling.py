"""Logits to the next token: greedy, temperature, top-k, top-p. Pure: chance comes in as numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Choose among this many most likely tokens; 0 is all."""
    top_p: float = 0.0
    """Choose among the fewest tokens whose probabilities reach this sum; 0 and 1 are all."""

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that makes no sense, in flags of tools/generate.py."""
        if not 0.0 <= self.temperature < float("inf"):
            yield f"--temperature {self.temperature} must be 0 (greedy) or more"
        if self.top_k < 0:
            yield f"--top-k {self.top_k} must be 0 (all tokens) or more"
        if not 0.0 <= self.top_p <= 1.0:
            yield f"--top-p {self.top_p} must lie between 0 and 1"
        if self.temperature == 0 and (self.top_k or self.top_p):
            yield "--top-k and --top-p have no effect on greedy choice; leave them out"


def choose_tokens(logits: Tensor, options: SamplingOptions, chance: Tensor) -> Tensor:
    """Choose one token for each row.

    Args:
        logits: [b, v], any dtype; -inf for ids that must not be chosen.
        options: How.
        chance: [b] float64 in [0, 1); unused by greedy choice.

    Returns:
        Ids [b], int64. Among equal logits the lowest id comes first.
    """
    if options.temperature == 0:
        return _ranked(logits)[1][:, 0]
    probs, ids = ranked_probs(logits, options)
    heights = probs.cumsum(-1)
    place = torch.searchsorted(heights, chance[:, None] * heights[:, -1:], right=True)
    return ids.gather(-1, place)[:, 0]


def ranked_probs(logits: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Return the distribution that is drawn from, most likely token first.

    Top-k comes first, top-p then counts the probabilities among those; at least one token stays.

    Args:
        logits: [b, v].
        options: With a temperature above 0.

    Returns:
        Probabilities [b, v] in float64, 0 where left out, not normalised; and their ids [b, v].

    Source: top-k: Fan et al. 2018 (arXiv:1805.04833); top-p: Holtzman et al. 2019
    (arXiv:1904.09751).
    """
    ranked, ids = _ranked(logits)
    # the best logit first becomes 0, so that a tiny temperature cannot overflow
    probs = ((ranked.double() - ranked[:, :1].double()) / options.temperature).softmax(-1)
    if options.top_k:
        probs[:, options.top_k :] = 0
    if 0.0 < options.top_p < 1.0:
        probs = probs / probs.sum(-1, keepdim=True)
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= options.top_p, 0)
    return probs, ids


def _ranked(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and ids from the largest down; stable, so ties are in the order of ids."""
    ranked, ids = logits.sort(dim=-1, descending=True, stable=True)
    return ranked, ids
