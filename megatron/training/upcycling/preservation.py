"""When a mixture of copies computes what the dense MLP did, and by which factor. Pure, no torch.

The algebra. E experts are N = E / G copies of the MLP, each cut into G slices of its ffn channels;
expert c G + s is slice s of copy c, and all slices of a copy have one router row, so equal logits:
the K best experts of a token are K / G whole copies. With weights w the layer computes
``sum over chosen copies c of w_c (slice_1 + ... + slice_G)(x)``, which is the MLP times the sum of
w_c over the chosen copies.

- Weights that are divided by their sum over the chosen experts: each copy holds G of them, so the
  sum over copies is 1 / G whatever the router says. Factor G.
- Weights that are not (a softmax over all experts, a sigmoid of its own): the sum depends on the
  token, unless all weights are equal. So router rows begin so small that each weight is the value v
  at logit 0 to rounding, while their order still spreads the tokens. Factor G / (K v).

The bias behind the second matrix is divided by G, since it is added once for each slice.

Source: sparse upcycling (arXiv:2212.05055); slices and router groups: He et al. (arXiv:2410.07524).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a dense MLP becomes experts."""

    granularity: int = 1
    """Slices of the ffn channels that each copy is cut into (G)."""
    noise: float = 0.0
    """Weights of all copies but the first are multiplied by 1 + noise x N(0, 1)."""
    drop: float = 0.0
    """Share of the ffn channels of each expert that are drawn anew (arXiv:2502.19261)."""
    seed: int = 1234
    """Of router rows, noise and drawn channels."""
    router_std: float | None = None
    """Standard deviation of router rows; ``router_std`` of the model and its dtype when None."""

    @property
    def keeps(self) -> bool:
        """Whether it is meant to keep the function."""
        return not (self.noise or self.drop)

    def changes(self) -> str:
        """Say what changes the function, in the tool's flags."""
        parts = [f"--noise {self.noise:g}"] * bool(self.noise)
        return " and ".join(parts + [f"--drop {self.drop:g}"] * bool(self.drop))


def equal_weight(model: TransformerConfig) -> float | None:
    """Return the weight that all chosen experts of a layer need; None where any weights do.

    Args:
        model: Of one MoE layer (``TransformerConfig.for_layer``).
    """
    experts, topk = model.num_moe_experts or 1, model.moe_router_topk
    score, pre_softmax = model.moe_router_score_function, model.moe_router_pre_softmax
    if model.moe_router_choice == "sinkhorn":  # has a rule of its own
        score, pre_softmax = ("sigmoid", False) if topk == 1 else ("softmax", True)
    if score == "softmax":
        return 1 / experts if pre_softmax and topk < experts else None
    if topk > 1 and model.moe_router_norm_topk_prob:
        return None
    return 0.5 if score == "sigmoid" else math.sqrt(math.log(2))


def needed_factor(model: TransformerConfig, granularity: int) -> float:
    """Return what the weights of a layer must be multiplied by to keep the function.

    Args:
        model: Of one MoE layer.
        granularity: Slices of a copy.
    """
    weight = equal_weight(model)
    if weight is None:
        return float(granularity)
    return granularity / (model.moe_router_topk * weight)


def factors(model: TransformerConfig, granularity: int) -> dict[int, float]:
    """Return MoE layer -> ``needed_factor``."""
    return {layer: needed_factor(model.for_layer(layer), granularity) for layer in model.moe_layers}


def factor_of_router(model: TransformerConfig, granularity: int) -> float | None:
    """Return the --moe-router-topk-scaling-factor that keeps the function of every layer.

    None where no factor is needed, where layers need different ones, and where the choice of
    experts takes none: what is left goes into the second matrices.
    """
    found = set(factors(model, granularity).values())
    if model.moe_router_choice == "sinkhorn" or len(found) != 1:
        return None
    factor = found.pop()
    return None if factor == 1.0 else factor


def folds(model: TransformerConfig, granularity: int) -> dict[int, float]:
    """Return MoE layer -> factor of its second matrices, beside that of the router."""
    of_router = model.moe_router_topk_scaling_factor or 1.0
    return {layer: needed / of_router for layer, needed in factors(model, granularity).items()}


def router_std(model: TransformerConfig, rounding: float) -> float:
    """Return the standard deviation of the router rows of one layer.

    Args:
        model: Of one MoE layer.
        rounding: Distance from 1 to the next number of the format that the layer computes in.

    Returns:
        That of other weights; where weights must be equal, one under which they are to rounding
        for inputs of unit size.
    """
    if equal_weight(model) is None:
        return model.init_method_std
    return rounding / 4 / math.sqrt(model.hidden_size)


def tokens_crowd(model: TransformerConfig) -> bool:
    """Tell whether, with equal weights, scores choose: then all are equal too, the first win."""
    if equal_weight(model) is None or model.moe_router_type == "hash":
        return False
    by_score = model.moe_router_score_function != "softmax" or model.moe_router_pre_softmax
    biased = model.moe_router_enable_expert_bias
    return biased or (by_score and model.moe_router_num_groups is not None)


def preservation_problems(model: TransformerConfig, granularity: int) -> Iterator[str]:
    """Yield a sentence for each reason why experts cannot compute what the MLP did."""
    shown = f"--moe-upcycling-granularity {granularity}"
    if model.chooses_by_expert:
        yield (
            "--moe-router-type expert_choice cannot begin as the dense model: experts take as many "
            "tokens as their capacity, and some tokens have none"
        )
    if model.moe_latent_size is not None:
        yield (
            f"--moe-latent-size {model.moe_latent_size} cannot begin as the dense model: its "
            "experts read another space than the MLP does"
        )
    if model.moe_shared_expert_gate:
        yield (
            "--moe-shared-expert-gate cannot begin as the dense model: the gate multiplies the "
            "shared channels by another number for each token"
        )
    if granularity > 1 and model.moe_router_type == "hash":
        yield f"{shown} needs a router whose rows keep slices together, not --moe-router-type hash"
    if granularity > 1 and model.moe_router_choice == "sinkhorn":
        yield f"{shown} excludes sinkhorn balancing, which takes the slices of a copy apart"
    of_layers = (model.for_layer(layer) for layer in model.moe_layers)
    yield from dict.fromkeys(p for own in of_layers for p in _layer_problems(own, granularity))


def _layer_problems(model: TransformerConfig, granularity: int) -> Iterator[str]:
    experts, groups = model.num_moe_experts or 1, model.moe_router_num_groups
    shown = f"--moe-upcycling-granularity {granularity} must divide"
    if experts % granularity:
        yield f"{shown} --num-experts {experts}: experts are slices of whole copies"
    elif model.moe_router_topk % granularity:
        yield (
            f"{shown} --moe-router-topk {model.moe_router_topk}: a token needs all slices of a copy"
        )
    elif groups and experts // groups % granularity:
        yield (
            f"{shown} the {experts // groups} experts of a group (--moe-router-num-groups "
            f"{groups}): a copy lies in one group"
        )
