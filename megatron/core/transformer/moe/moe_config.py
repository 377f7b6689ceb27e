"""Options of the mixture-of-experts layer. TransformerConfig inherits them, so names stay flat."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.core.config_field import flag
from megatron.core.transformer.config.layer_pattern import parse_layer_pattern


@dataclass(kw_only=True)
class MoEConfig:
    """Mixture-of-experts layer."""

    num_moe_experts: int | None = field(default=None, metadata=flag("--num-experts"))
    """Number of routed experts in a MoE layer. All layers are dense when not set or 0."""

    moe_layer_freq: int | list[int] = field(default=1, metadata=flag(parse=parse_layer_pattern))
    """Which layers are MoE: N for every N-th layer beginning with the first, or a pattern such as
    ([0]*3+[1]*9) with one 0 (dense) or 1 (MoE) for each layer."""

    moe_ffn_hidden_size: int | None = None
    """Width of each expert; --ffn-hidden-size when not set."""

    moe_shared_expert_intermediate_size: int | None = None
    """Width of all shared experts together (their number x the width of one). Every token goes
    through them, and their output is added. None are there when not set."""

    moe_shared_expert_gate: bool = False
    """Multiply the output of the shared experts by the sigmoid of a learned product with the
    token."""

    moe_latent_size: int | None = None
    """Width of the latent space of the routed experts: a matrix of --hidden-size rows takes each
    token there before it is sent, another one brings the sum back. Router and shared experts stay
    at --hidden-size, and so do the routed experts when not set."""

    moe_router_topk: int = 2
    """Number of experts that each token is sent to."""

    moe_router_pre_softmax: bool = False
    """Apply the softmax over all experts before top-k instead of over the selected ones."""

    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Number format of the router's product, scores, losses and combine weights."""

    moe_router_load_balancing_type: list[Literal["aux_loss", "none"]] = field(
        default_factory=lambda: ["aux_loss"]
    )
    """How tokens are kept spread over experts: an auxiliary loss, or none."""

    moe_aux_loss_coeff: list[float] | None = None
    """Weight of the load-balancing loss, one value for each balancing type; 0 turns it off. When
    not set: 0.01 under aux_loss, announced at the start."""

    moe_z_loss_coeff: float | None = None
    """Weight of the router z-loss, which keeps logits small; 1e-3 is a usual start. Off when not
    set."""

    moe_token_dispatcher_type: Literal[
        "allgather", "alltoall", "alltoall_dedup", "alltoall_hierarchical"
    ] = "alltoall"
    """How tokens travel to the ranks that hold their experts: gather all tokens everywhere, send
    each once for each of its experts, or once for each rank that holds some of them, or (for each
    expert) within the node first and then across nodes."""

    moe_expert_capacity_factor: float | None = None
    """Largest number of tokens an expert takes from one microbatch of a rank, in multiples of the
    mean, tokens x top-k / experts; further tokens skip it. When not set no token is dropped."""

    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert keeps when it is full: those of largest probability, or the first."""

    moe_pad_expert_input_to_capacity: bool = False
    """Fill up each expert to exactly its capacity, so that shapes are the same in every step."""

    moe_experts_type: Literal["grouped", "sequential"] = "grouped"
    """Expert bank: one stacked weight with grouped matrix products, or one plain MLP after
    another (readable, slow). Checkpoints are interchangeable."""

    def __post_init__(self) -> None:
        """Take Megatron-LM's single values as lists of one: ``moe_aux_loss_coeff=0.01``."""
        self.moe_aux_loss_coeff = _listed(self.moe_aux_loss_coeff)
        self.moe_router_load_balancing_type = _listed(self.moe_router_load_balancing_type)

    def moe_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        if self.num_moe_experts is None:
            return
        if not 1 <= self.moe_router_topk <= self.num_moe_experts:
            yield (
                f"--moe-router-topk {self.moe_router_topk} must lie between 1 and "
                f"--num-experts {self.num_moe_experts}"
            )
        if self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            yield (
                "--moe-router-topk 1 needs --moe-router-pre-softmax: a softmax over the one chosen "
                "expert is always 1 and would give the router no gradient"
            )
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            yield (
                "--moe-shared-expert-gate needs shared experts: add "
                "--moe-shared-expert-intermediate-size, or leave it out"
            )
        yield from self._balancing_problems()

    def _balancing_problems(self) -> Iterator[str]:
        kinds, coeffs = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        shown = f"--moe-router-load-balancing-type {' '.join(kinds)}"
        if len(set(kinds)) < len(kinds):
            yield f"{shown} names one way twice"
        elif "none" in kinds and len(kinds) > 1:
            yield f"{shown}: none excludes the others"
        elif "none" not in kinds and coeffs is not None and len(coeffs) != len(kinds):
            yield (
                f"--moe-aux-loss-coeff {' '.join(map(str, coeffs))} has {len(coeffs)} values for "
                f"the {len(kinds)} of {shown}; give one for each"
            )

    @property
    def max_experts_per_token(self) -> int:
        """Experts that one token is sent to at most: all, when any token may be padding."""
        assert self.num_moe_experts is not None, "a dense layer has no experts"
        padded = self.moe_pad_expert_input_to_capacity
        return self.num_moe_experts if padded else self.moe_router_topk

    @property
    def aux_loss_coeff(self) -> float:
        """Coefficient of the auxiliary loss in force: 0 when balancing is ``none``."""
        if "aux_loss" not in self.moe_router_load_balancing_type:
            return 0.0
        if self.moe_aux_loss_coeff is None:
            return 0.01
        return self.moe_aux_loss_coeff[self.moe_router_load_balancing_type.index("aux_loss")]


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]
