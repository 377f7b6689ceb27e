"""The textbook mixture of experts: a gate, top-k, a loop over experts with masks, a canvas.

Nothing of megatron is used, so that the two can disagree. Slow, and easy to check by eye.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ReferenceExpert(nn.Module):
    """down(silu(gate(x)) * up(x)) under SwiGLU, else down(gelu(up(x)))."""

    def __init__(self, hidden: int, ffn: int, *, swiglu: bool, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias=bias) if swiglu else None
        self.up = nn.Linear(hidden, ffn, bias=bias)
        self.down = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(nn.functional.gelu(self.up(x)))
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


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
    """Gate, top-k, softmax over the chosen scores, experts one after another."""

    def __init__(
        self,
        hidden: int,
        ffn: int,
        num_experts: int,
        topk: int,
        *,
        swiglu: bool = True,
        bias: bool = False,
        pre_softmax: bool = False,
        capacity_factor: float | None = None,
        drop_policy: str = "probs",
        shared_ffn: int | None = None,
        shared_gate: bool = False,
        latent: int | None = None,
    ) -> None:
        super().__init__()
        self.topk, self.pre_softmax = topk, pre_softmax
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.there = self.back = None
        if latent is not None:
            self.there = nn.Linear(hidden, latent, bias=bias)
            self.back = nn.Linear(latent, hidden, bias=bias)
        self.experts = nn.ModuleList(
            ReferenceExpert(latent or hidden, ffn, swiglu=swiglu, bias=bias)
            for _ in range(num_experts)
        )
        self.shared = self.shared_gate = None
        if shared_ffn is not None:
            self.shared = ReferenceExpert(hidden, shared_ffn, swiglu=swiglu, bias=bias)
        if shared_gate:
            self.shared_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, tokens: Tensor) -> ReferenceOutput:
        """Apply to ``tokens`` [num_tokens, h]."""
        logits = self.gate(tokens)
        if self.pre_softmax:
            weights, chosen = logits.softmax(dim=-1).topk(self.topk, dim=-1)
        else:
            scores, chosen = logits.topk(self.topk, dim=-1)
            weights = scores.softmax(dim=-1)
        if self.capacity_factor is not None:
            share = len(tokens) * self.topk / len(self.experts)
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

        counts = torch.stack([(chosen == number).sum() for number in range(len(self.experts))])
        num_tokens = max(len(tokens), 1)
        share = counts.to(logits.dtype) / (num_tokens * self.topk)
        mean_prob = logits.softmax(dim=-1).sum(dim=0) / num_tokens
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
