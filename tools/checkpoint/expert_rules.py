"""What surgery on experts does to the options of a model, and when it cannot be done.

The algebra of clones, with K copies of each of E experts and K k experts a token: copies have
equal logits, so the K k best of them are all copies of the k best before.

- softmax, before or after top-k: each copy has 1/K of the weight; the sum is what it was.
- sigmoid, sqrtsoftplus with k > 1: scores over their sum over the chosen, so again 1/K each.
- the same without division (--no-moe-router-norm-topk-prob): --moe-router-topk-scaling-factor
  becomes 1/K of it.
- sigmoid, sqrtsoftplus with k = 1: the weight is the score itself, but with K k > 1 it would be
  divided by the sum: no copies beside each other, only ``keep_topk``.
- expert choice by sigmoid: no division; --moe-router-topk-scaling-factor becomes 1/K of it.
- ``keep_topk``, with k = 1 alone: of equal copies the first is chosen. Its softmax over all is 1/K
  of what it was, so the scaling factor becomes K times it; a score of its own stays.

A group of experts is judged by K times as many of its experts, where a number is given: copies of
the best ones, so that its worth is K times what it was.

Expert bias, prices, groups of neighbours, capacities and the balance loss go with it unchanged.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.checkpoint_model import for_one_process
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import architecture
from tools.checkpoint.expert_plans import LayerPlan


def experts_of(model: TransformerConfig) -> dict[int, int]:
    """Return MoE layer -> number of experts.

    Raises:
        ConfigError: There is none, or multi-token prediction has some too.
    """
    if model.num_moe_experts is None:
        raise ConfigError("the checkpoint is of a dense model: it has no experts")
    if model.mtp_depths and model.moe_layer_pattern[-1]:
        raise ConfigError(
            f"--mtp-num-layers {model.mtp_num_layers}: multi-token prediction has experts like the "
            "last layer's, and these cannot be changed here yet"
        )
    return dict(zip(model.moe_layers, model.moe_experts_by_layer, strict=True))


def refuse_hash(model: TransformerConfig) -> None:
    """Refuse routers that do not know their experts by what they learned."""
    if model.moe_router_type == "hash":
        raise ConfigError(
            "--moe-router-type hash: which experts a token has is a function of its id and of the "
            "number of experts, so other experts would be another model; nothing can be done here"
        )


def group_problems(model: TransformerConfig, plans: Mapping[int, LayerPlan]) -> Iterator[str]:
    """Yield a sentence for each layer whose groups of experts would be torn (see MoEConfig)."""
    groups = model.moe_router_num_groups
    if groups is None:
        return
    old = experts_of(model)
    for layer, plan in plans.items():
        shown = f"layer {layer}: --moe-router-num-groups {groups}"
        if len(plan) % groups:
            yield f"{shown} must divide its {len(plan)} experts"
            continue
        size, old_size = len(plan) // groups, old[layer] // groups
        origins = []
        for group in range(groups):
            members = plan[group * size : (group + 1) * size]
            origins.append({e // old_size for new in members for e, _ in new.parts})
        if any(len(origin) > 1 for origin in origins) or len(set(map(frozenset, origins))) < groups:
            shares = "; ".join(
                f"group {number} of old {' and '.join(map(str, sorted(origin)))}"
                for number, origin in enumerate(origins)
            )
            yield f"{shown} groups of {old_size} neighbours must stay whole, not {shares}"


def clone_problems(
    model: TransformerConfig, layers: Mapping[int, int], *, keep_topk: bool
) -> Iterator[str]:
    """Yield a sentence for each reason why clones cannot keep the function.

    Args:
        model: Of the checkpoint.
        layers: MoE layer -> experts a token, of the layers to clone.
        keep_topk: A token has as many experts as before.
    """
    score = model.moe_router_score_function
    ones = [layer for layer, topk in layers.items() if topk == 1]
    many = [layer for layer, topk in layers.items() if topk > 1]
    if keep_topk:
        if many:
            yield (
                f"--keep-topk needs --moe-router-topk 1, and layer {many[0]} has {layers[many[0]]}:"
                " both copies of one expert would be chosen in the place of two experts"
            )
        if model.chooses_by_expert:
            yield (
                "--keep-topk excludes --moe-router-type expert_choice: each copy would take fewer "
                "tokens, and all copies the same ones"
            )
        if model.moe_expert_capacity_factor is not None:
            yield (
                f"--keep-topk excludes --moe-expert-capacity-factor "
                f"{model.moe_expert_capacity_factor}: all tokens would go to the first copy, whose "
                "capacity is smaller"
            )
    elif ones and not model.chooses_by_expert:
        own = "sinkhorn" if model.moe_router_choice == "sinkhorn" else score
        if own == "sinkhorn" or (own != "softmax" and model.moe_router_norm_topk_prob):
            yield (
                f"layer {ones[0]} has --moe-router-topk 1, where the weight of an expert is its own"
                f" score ({own}); with more experts a token it would be divided by their sum: "
                "use --keep-topk"
            )
    every = set(layers) == set(model.moe_layers)
    changed = {
        "--moe-router-topk-scaling-factor": scaling_of_clones(model, 2, keep_topk=keep_topk),
        "--moe-router-group-score-topk": judges_of_clones(model, 2),
    }
    for flag, value in changed.items():
        if value is not None and not every:
            yield (
                f"the copies need another {flag}, which is one for all layers: leave out --layers"
            )


def judges_of_clones(model: TransformerConfig, copies: int) -> int | None:
    """Return --moe-router-group-score-topk with which groups are worth as before; None: as is."""
    judges = model.moe_router_group_score_topk
    return None if judges is None else judges * copies


def scaling_of_clones(model: TransformerConfig, copies: int, *, keep_topk: bool) -> float | None:
    """Return --moe-router-topk-scaling-factor with which clones keep the function; None: as is."""
    factor = model.moe_router_topk_scaling_factor or 1.0
    if model.moe_router_choice == "sinkhorn":
        return None  # weights of its own
    if model.chooses_by_expert:
        return None if model.moe_router_score_function == "softmax" else factor / copies
    is_own = model.moe_router_score_function != "softmax" and not model.moe_router_norm_topk_prob
    if is_own and not keep_topk:
        return factor / copies
    is_over_all = model.moe_router_score_function == "softmax" and model.moe_router_pre_softmax
    return factor * copies if keep_topk and is_over_all else None


def edited_config(
    config: RunConfig,
    plans: Mapping[int, LayerPlan],
    topk: Mapping[int, int],
    scaling_factor: float | None = None,
    judges: int | None = None,
) -> RunConfig:
    """Return the configuration of the model after surgery.

    Args:
        config: Of the checkpoint.
        plans: MoE layer -> its new experts; other layers stay.
        topk: MoE layer -> experts a token; other layers stay.
        scaling_factor: --moe-router-topk-scaling-factor; as it was when None.
        judges: --moe-router-group-score-topk; as it was when None.

    Raises:
        ConfigError: No such model can be; all reasons are named.
    """
    new = copy.deepcopy(config)
    model, old = new.model, config.model
    layers = old.moe_layers
    experts = [
        len(plans[layer]) if layer in plans else number for layer, number in experts_of(old).items()
    ]
    topks = [topk.get(layer, k) for layer, k in zip(layers, old.moe_topk_by_layer, strict=True)]
    model.num_moe_experts, model.moe_router_topk = max(experts), max(topks)
    model.moe_num_experts_per_layer = _pattern(old.num_layers, layers, experts)
    model.moe_router_topk_per_layer = _pattern(old.num_layers, layers, topks)
    if scaling_factor is not None:
        model.moe_router_topk_scaling_factor = scaling_factor
    if judges is not None:
        model.moe_router_group_score_topk = judges
    alone = copy.deepcopy(new)
    for_one_process(alone)
    alone.model.check()
    return new


def changed_flags(before: Mapping[str, Any], after: RunConfig) -> list[str]:
    """Return what a run that goes on must give, of what was changed: ``--num-experts 8``.

    Args:
        before: The ``architecture`` of the checkpoint.
        after: The new configuration.
    """
    now = architecture(after.model)
    words = []
    by_layer = {
        "--num-experts": "--moe-num-experts-per-layer",
        "--moe-router-topk": "--moe-router-topk-per-layer",
    }
    for flag, value in now.items():
        if before.get(flag) == value or flag in by_layer.values():
            continue
        if now.get(by_layer.get(flag, "")) is None:
            words.append(f"{flag} {value}")
    for flag in by_layer.values():
        if now[flag] is not None and before.get(flag) != now[flag]:
            words.append(f'{flag} "([{"]+[".join(map(str, now[flag]))}])"')
    return words


def unlike(model: TransformerConfig) -> list[str]:
    """Return why fewer experts change the function even for tokens that never chose them."""
    if model.chooses_by_expert:
        return ["experts choose tokens: their capacity and the softmax over all experts change"]
    reasons = []
    choice, score = model.moe_router_choice, model.moe_router_score_function
    if choice == "sinkhorn" or (score == "softmax" and model.moe_router_pre_softmax):
        reasons.append("weights are a softmax over all experts, whose sum loses those that go")
    if model.moe_router_num_groups is not None:
        reasons.append("the best experts of a group decide whether it is used")
    if model.moe_expert_capacity_factor is not None:
        reasons.append("the capacity of an expert grows when there are fewer")
    return reasons


def _pattern(num_layers: int, layers: tuple[int, ...], values: list[int]) -> list[int] | None:
    if len(set(values)) == 1:
        return None
    by_layer = dict(zip(layers, values, strict=True))
    return [by_layer.get(layer, 0) for layer in range(num_layers)]
