"""The textbook mixture of experts: a gate, top-k, a loop over experts with masks, a canvas.

Nothing of megatron is used, so that the two can disagree. Slow, and easy to check by eye.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.reference.activations import ACTIVATIONS, ReferenceActivation


class ReferenceExpert(nn.Module):
    """down(f(gate(x)) * up(x)) where f is gated, else down(f(up(x)))."""

    def __init__(
        self, hidden: int, ffn: int, *, activation: ReferenceActivation, bias: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(hidden, ffn, bias=bias) if activation.gated else None
        self.up = nn.Linear(hidden, ffn, bias=bias)
        self.down = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.gate is not None:
            inner = torch.cat((self.gate(x), inner), dim=-1)
        return self.down(self.activation(inner))


class ReferenceRule(NamedTuple):
    """How the gate's logits become weights."""

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 1
    group_topk: int = 1
    group_score_topk: int | None = None
    norm_topk_prob: bool = True


def raw_scores(logits: Tensor, rule: ReferenceRule) -> Tensor:
    """Scores of all experts, as their definition says; softmax over all of them."""
    if rule.score_function == "sigmoid":
        return 1 / (1 + (-logits).exp())
    if rule.score_function == "sqrtsoftplus":
        return logits.exp().log1p().sqrt()
    return logits.softmax(dim=-1)


def full_scores(logits: Tensor, rule: ReferenceRule) -> Tensor:
    """Scores of all experts, made to sum to 1."""
    scores = raw_scores(logits, rule)
    return scores / scores.sum(dim=-1, keepdim=True)


def reference_routing(
    logits: Tensor, rule: ReferenceRule, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return weights and chosen experts [num_tokens, topk], one token after another."""
    weights, chosen = [], []
    scores = raw_scores(logits, rule)
    for token in range(len(logits)):
        is_late = rule.score_function == "softmax" and not rule.pre_softmax
        worth = (logits if is_late else scores)[token]
        worth = (worth if bias is None else worth + bias).tolist()
        order = sorted(_experts_of_best_groups(worth, rule), key=lambda e: (-worth[e], e))
        experts = torch.tensor(order[: rule.topk])
        weight = scores[token, experts]
        is_own = rule.pre_softmax or (
            rule.score_function != "softmax" and (rule.topk == 1 or not rule.norm_topk_prob)
        )
        weights.append((weight if is_own else weight / weight.sum()) * rule.scaling_factor)
        chosen.append(experts)
    if not chosen:
        none = logits.new_zeros(0, rule.topk)
        return none, none.long()
    return torch.stack(weights), torch.stack(chosen)


def _experts_of_best_groups(worth: list[float], rule: ReferenceRule) -> list[int]:
    size = len(worth) // rule.num_groups
    each = rule.group_score_topk or rule.topk // rule.group_topk
    groups = [list(range(g * size, (g + 1) * size)) for g in range(rule.num_groups)]
    sums = [sum(sorted((worth[e] for e in group), reverse=True)[:each]) for group in groups]
    best = sorted(range(rule.num_groups), key=lambda g: (-sums[g], g))[: rule.group_topk]
    return [e for g in best for e in groups[g]]


class ReferenceOutput(NamedTuple):
    output: Tensor
    """[num_tokens, h]."""
    balance_loss: Tensor
    """E * sum_i f_i P_i, without a coefficient."""
    z_loss: Tensor
    """mean of logsumexp squared, without a coefficient."""
    tokens_per_expert: Tensor
    """[num_experts]."""


class ReferenceMoE(nn.Module):
    """Gate, top-k, weights of the chosen, experts one after another."""

    def __init__(
        self,
        hidden: int,
        ffn: int,
        num_experts: int,
        *,
        activation: ReferenceActivation = ACTIVATIONS["swiglu"],
        bias: bool = False,
        latent_bias: bool = False,
        router_bias: bool = False,
        rule: ReferenceRule,
        capacity_factor: float | None = None,
        drop_policy: str = "probs",
        shared_ffn: int | None = None,
        shared_gate: bool = False,
        latent: int | None = None,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy
        self.gate = nn.Linear(hidden, num_experts, bias=router_bias)
        self.there = self.back = None
        if latent is not None:
            self.there = nn.Linear(hidden, latent, bias=latent_bias)
            self.back = nn.Linear(latent, hidden, bias=latent_bias)
        self.experts = nn.ModuleList(
            ReferenceExpert(latent or hidden, ffn, activation=activation, bias=bias)
            for _ in range(num_experts)
        )
        self.shared = self.shared_gate = None
        if shared_ffn is not None:
            self.shared = ReferenceExpert(hidden, shared_ffn, activation=activation, bias=bias)
        if shared_gate:
            self.shared_gate = nn.Linear(hidden, 1, bias=False)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and chosen experts [num_tokens, topk]."""
        return reference_routing(logits, self.rule)

    def forward(self, tokens: Tensor) -> ReferenceOutput:
        """Apply to ``tokens`` [num_tokens, h]."""
        logits = self.gate(tokens)
        weights, chosen = self.route(logits)
        if self.capacity_factor is not None:
            share = len(tokens) * self.rule.topk / len(self.experts)
            capacity = math.ceil(share * self.capacity_factor)
            weights = weights * kept_pairs(weights, chosen, capacity, self.drop_policy)

        inputs = tokens if self.there is None else self.there(tokens)
        canvas = torch.zeros_like(inputs)
        for number, expert in enumerate(self.experts):
            mask = chosen == number  # [num_tokens, topk]
            token, place = mask.nonzero(as_tuple=True)
            weighted = expert(inputs[token]) * weights[token, place].unsqueeze(-1)
            canvas = canvas.index_add(0, token, weighted)

        if self.back is not None:
            canvas = self.back(canvas)
        if self.shared is not None:
            shared = self.shared(tokens)
            if self.shared_gate is not None:
                shared = shared * torch.sigmoid(self.shared_gate(tokens))
            canvas = canvas + shared

        numbers = range(len(self.experts))
        counts = torch.stack([(chosen == number).sum() for number in numbers])
        _, best = reference_routing(logits, self.rule._replace(num_groups=1, group_topk=1))
        wanted = torch.stack([(best == number).sum() for number in numbers])
        num_tokens = max(len(tokens), 1)
        share = wanted.to(logits.dtype) / (num_tokens * self.rule.topk)
        mean_prob = full_scores(logits, self.rule).sum(dim=0) / num_tokens
        return ReferenceOutput(
            output=canvas,
            balance_loss=len(self.experts) * (share * mean_prob).sum(),
            z_loss=logits.logsumexp(dim=-1).square().sum() / num_tokens,
            tokens_per_expert=counts,
        )

    def logical(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """Return weights, or their gradients, under the names a MoE layer gives them.

        Gate and up are stacked, as ``linear_fc1`` stacks them.
        """
        of = {name: p.grad if gradients else p for name, p in self.named_parameters()}
        found = {"router.weight": of["gate.weight"]}
        if "gate.bias" in of:
            found["router.bias"] = of["gate.bias"]
        stacks = {f"experts.{n}": expert for n, expert in enumerate(self.experts)}
        if self.shared is not None:
            stacks["shared"] = self.shared
        for name, place in (("there", "fc1_latent_proj"), ("back", "fc2_latent_proj")):
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in of:
                    found[f"{place}.{kind}"] = of[f"{name}.{kind}"]
        if self.shared_gate is not None:
            found["shared_experts.gate_weight"] = of["shared_gate.weight"]
        for name, expert in stacks.items():
            for kind in ("weight", "bias") if expert.up.bias is not None else ("weight",):
                up = of[f"{name}.up.{kind}"]
                parts = [up] if expert.gate is None else [of[f"{name}.gate.{kind}"], up]
                place = name.replace("experts.", "experts.local_experts.")
                place = place.replace("shared", "shared_experts")
                found[f"{place}.linear_fc1.{kind}"] = torch.cat(parts)
                found[f"{place}.linear_fc2.{kind}"] = of[f"{name}.down.{kind}"]
        return found


def kept_pairs(weights: Tensor, chosen: Tensor, capacity: int, policy: str) -> Tensor:
    """Return which (token, choice) pairs fit into their expert, [num_tokens, topk] bool.

    An expert takes tokens one after another, the earliest first or the heaviest first.
    """
    kept = torch.zeros_like(chosen, dtype=torch.bool)
    for expert in set(chosen.flatten().tolist()):
        pairs = (chosen == expert).nonzero().tolist()
        if policy == "probs":
            pairs.sort(key=lambda pair: -weights[pair[0], pair[1]].item())  # stable
        for token, choice in pairs[:capacity]:
            kept[token, choice] = True
    return kept
