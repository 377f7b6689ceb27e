"""Options of ways to choose experts other than by their score. MoEConfig inherits them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from megatron.core.config_field import flag

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_config import MoEConfig

BALANCED_CHOICES = ("sinkhorn", "quantile_balancing")
"""Balancing types that are no loss: they change which experts are chosen."""


@dataclass(kw_only=True)
class RouterChoiceConfig:
    """Mixture-of-experts layer: choice of experts."""

    moe_router_bias: bool = False
    """Give the router's product a trained bias, one number for each expert: part of the logits, of
    choice and of weights alike, unlike --moe-router-enable-expert-bias."""

    moe_router_norm_topk_prob: bool = field(
        default=True, metadata=flag("--no-moe-router-norm-topk-prob")
    )
    """Divide the sigmoid or sqrtsoftplus scores of the chosen experts by their sum, so that they
    weigh 1 together."""

    moe_router_group_score_topk: int | None = None
    """How many of its best experts judge a group of experts (--moe-router-num-groups), by the sum
    of their scores: 2 in DeepSeek-V3, 1 in DeepSeek-V2. --moe-router-topk /
    --moe-router-group-topk when not set."""

    moe_router_quantile_balancing_ema: float = 0.0
    """How much of an expert's price stays at each step under quantile_balancing; the rest is what
    the step would have asked. 0 takes the step's alone."""

    moe_router_force_biased: float | None = None
    """For benchmarks only: in training, route by random logits plus a random number for each
    expert, of this standard deviation, so that some experts are crowded. The numbers are new in
    each step; under a negative value they stay for the whole run. Off when not set."""

    moe_enable_routing_replay: bool = False
    """Give each router a RouterReplay, through which a script records the chosen experts and
    replays them (megatron/core/transformer/moe/router_replay.py)."""

    @property
    def moe_router_choice(self) -> Literal["topk", "sinkhorn", "quantile_balancing"] | None:
        """What chooses experts: the scores alone, or a balancing type; None without experts."""
        config = cast("MoEConfig", self)
        if config.num_moe_experts is None:
            return None
        for kind in config.moe_router_load_balancing_type:
            if kind == "sinkhorn" or kind == "quantile_balancing":
                return kind
        return "topk"

    def router_choice_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction of the choice of experts."""
        config = cast("MoEConfig", self)
        if config.moe_router_enable_expert_bias and config.moe_router_score_function == "softmax":
            yield (
                "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid or "
                "sqrtsoftplus: a bias is added to the score of each expert alone"
            )
        yield from _weight_problems(config)
        if self.moe_router_force_biased == 0:
            yield (
                "--moe-router-force-biased 0 skews nothing; give a standard deviation, or use "
                "--moe-router-force-load-balancing"
            )
        elif self.moe_router_force_biased is not None and config.moe_router_force_load_balancing:
            yield (
                "--moe-router-force-biased and --moe-router-force-load-balancing exclude each other"
            )
        if self.moe_router_choice in BALANCED_CHOICES:
            yield from _balanced_choice_problems(config)


def _weight_problems(config: "MoEConfig") -> Iterator[str]:
    if config.moe_router_norm_topk_prob:
        return
    shown = "--no-moe-router-norm-topk-prob"
    if config.chooses_by_expert:
        yield f"{shown} has no effect with --moe-router-type expert_choice: it never divides"
    elif config.moe_router_score_function == "softmax":
        yield (
            f"{shown} needs --moe-router-score-function sigmoid or sqrtsoftplus; with softmax give "
            "--moe-router-pre-softmax, whose weights are those of a softmax over all experts"
        )


def _balanced_choice_problems(config: "MoEConfig") -> Iterator[str]:
    choice = config.moe_router_choice
    shown = f"--moe-router-load-balancing-type {choice}"
    coeffs = config.moe_aux_loss_coeff
    if coeffs is not None and any(coeffs):
        yield (
            f"{shown} has no loss: leave out --moe-aux-loss-coeff "
            f"{' '.join(map(str, coeffs))}, or give 0"
        )
    refused = {
        "--moe-expert-capacity-factor": config.moe_expert_capacity_factor is not None,
        "--moe-router-enable-expert-bias": config.moe_router_enable_expert_bias,
        "--moe-router-num-groups": config.moe_router_num_groups is not None,
    }
    why = "it spreads tokens by itself"
    if choice == "sinkhorn":
        is_softmax = config.moe_router_score_function == "softmax"
        refused |= {
            "--moe-router-score-function": not is_softmax,
            "--moe-router-pre-softmax": config.moe_router_pre_softmax,
            "--moe-router-topk-scaling-factor": config.moe_router_topk_scaling_factor is not None,
        }
        why = "it spreads tokens by itself, and has weights of its own"
    found = [flag for flag, is_on in refused.items() if is_on]
    if found:
        yield f"{shown} cannot be combined with {', '.join(found)}: {why}"
    if choice == "quantile_balancing" and config.moe_router_topk == config.num_moe_experts:
        yield (
            f"{shown} needs --moe-router-topk {config.moe_router_topk} to be less than "
            f"--num-experts {config.num_moe_experts}: every token goes to all experts"
        )
