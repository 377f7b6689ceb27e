"""Options of the mixture-of-experts layer. TransformerConfig inherits them, so names stay flat."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.core.config_field import flag
from megatron.core.transformer.config.layer_pattern import parse_layer_pattern
from megatron.core.transformer.moe.router_config import BALANCED_CHOICES, RouterChoiceConfig


@dataclass(kw_only=True)
class MoEConfig(RouterChoiceConfig):
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

    moe_router_type: Literal["topk", "expert_choice", "hash"] = "topk"
    """Who chooses: each token its k best experts (topk); each expert the best tokens of the
    microbatch of a rank, as many as its capacity (expert_choice); or a fixed hash of the token's
    id and layer (hash). CAUSALITY: under expert_choice whether a token is taken depends on later
    tokens of its sequence, so the training loss of a language model is too good, for the future
    leaks into it. Evaluation and generation cannot do so: there each token goes to its k best
    experts, with the same weights, and losses of training and evaluation do not compare."""

    moe_router_topk: int = 2
    """Number of experts that each token is sent to; under --moe-router-type expert_choice the
    mean number, at capacity factor 1."""

    moe_router_pre_softmax: bool = False
    """Apply the softmax over all experts before top-k instead of over the selected ones."""

    moe_router_score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    """What makes scores of the router's logits: a softmax, or of each logit alone its sigmoid or
    the root of its softplus; the last two are divided by their sum over the chosen experts, unless
    --no-moe-router-norm-topk-prob."""

    moe_router_topk_scaling_factor: float | None = None
    """Number that the weights of the chosen experts are multiplied by; 1 when not set."""

    moe_router_num_groups: int | None = None
    """Number of equal groups of neighbouring experts, of which each token may use
    --moe-router-group-topk; as many as expert-parallel ranks bound a token's messages."""

    moe_router_group_topk: int | None = None
    """Number of groups that each token may use; a group is as good as the sum of its best
    --moe-router-group-score-topk experts."""

    moe_router_enable_expert_bias: bool = False
    """Keep experts evenly used by a bias for each, added to the scores that choose experts but not
    to their weights, and moved after every step. By bias alone, without a balancing loss:
    --moe-router-load-balancing-type none."""

    moe_router_bias_update_rate: float = 1e-3
    """How far one step moves the bias of an expert: up if it had fewer tokens than the mean, down
    if more."""

    moe_input_jitter_eps: float | None = None
    """Multiply the router's input, in training, by numbers drawn evenly between 1 - eps and 1 +
    eps, so that tokens near a border try several experts. Off when not set."""

    moe_router_force_load_balancing: bool = False
    """For benchmarks only: in training, route by random logits instead of the router's, so that
    experts are evenly used."""

    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Number format of the router's product, scores, losses and combine weights."""

    moe_router_load_balancing_type: list[
        Literal[
            "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing", "none"
        ]
    ] = field(default_factory=lambda: ["aux_loss"])
    """How tokens are kept spread over experts: by losses that ask for balance within a microbatch
    of one rank (aux_loss), within each sequence (seq_aux_loss) or within the microbatches of all
    ranks so far in the step (global_aux_loss), one or several; or by another choice of experts,
    spread evenly within a microbatch of one rank (sinkhorn) or under prices that follow the load
    of the steps (quantile_balancing); or none."""

    moe_aux_loss_coeff: list[float] | None = None
    """Weight of the load-balancing loss, one value for each balancing type; 0 turns it off. When
    not set: 0.01 for each loss, announced at the start."""

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
    mean, tokens x top-k / experts; further tokens skip it. When not set no token is dropped. Under
    --moe-router-type expert_choice the number that each expert takes; 1 when not set."""

    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert keeps when it is full: those of largest probability, or the first."""

    moe_pad_expert_input_to_capacity: bool = False
    """Fill up each expert to exactly its capacity, so that shapes are the same in every step."""

    moe_experts_type: Literal["grouped", "sequential"] = "grouped"
    """Expert bank: one stacked weight with grouped matrix products, or one plain MLP after
    another (readable, slow). Checkpoints are interchangeable."""

    moe_grouped_mm_backend: Literal["auto", "torch_native", "grouped_gemm"] = "auto"
    """What multiplies rows and weights of all experts: PyTorch's grouped product, or the package
    grouped_gemm (CUDA and bf16 only). auto is PyTorch's, on CPUs one expert after another."""

    moe_fused_activation: Literal["off", "auto", "compiled"] = "auto"
    """On a CPU, compute the SwiGLU of an expert, times the weight of the row, in one pass over
    memory by C++ that is compiled when the run begins: bf16 MoE layers take a sixth less time. auto
    does so for --swiglu in bf16 and fp32 where --cpu-kernels has compiled kernels; compiled fails
    where there is no compiler. Last bits differ from off, which is PyTorch's."""

    moe_expert_chunk_tokens: int | None = None
    """Send, compute and bring back this many tokens of a rank at a time, and each of these chunks
    again in backward: a rank whose experts are favoured then never holds more than one chunk's
    rows. All tokens go at once, and nothing is computed twice, when not set."""

    moe_shared_expert_overlap: bool = False
    """Compute shared experts while the rows of the routed experts are under way, out and back;
    backward likewise. Results are the same, bit for bit."""

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
        elif self.moe_router_type == "topk":
            yield from self._group_problems(self.num_moe_experts)
        yield from self._router_type_problems()
        late = self.moe_router_score_function == "softmax" and not self.moe_router_pre_softmax
        own = self.moe_router_choice == "sinkhorn" or self.chooses_by_expert  # weights of their own
        if self.moe_router_topk == 1 and late and not own:
            yield (
                "--moe-router-topk 1 needs --moe-router-pre-softmax: a softmax over the one chosen "
                "expert is always 1 and would give the router no gradient"
            )
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            yield (
                "--moe-shared-expert-gate needs shared experts: add "
                "--moe-shared-expert-intermediate-size, or leave it out"
            )
        yield from self._overlap_problems()
        yield from self._balancing_problems()
        yield from self.router_choice_problems()

    def _router_type_problems(self) -> Iterator[str]:
        """Refuse what presumes that each token chooses its best experts."""
        if self.moe_router_type == "topk":
            return
        kinds = self.moe_router_load_balancing_type
        by_expert = self.chooses_by_expert
        losses = kinds != ["none"] and (any(self.moe_aux_loss_coeff or ()) or kinds != ["aux_loss"])
        clashes = {
            "--moe-router-num-groups": self.moe_router_num_groups is not None,
            "--moe-router-group-topk": self.moe_router_group_topk is not None,
            "--moe-router-enable-expert-bias": self.moe_router_enable_expert_bias,
            "--moe-router-force-load-balancing": self.moe_router_force_load_balancing,
            "--moe-router-force-biased": self.moe_router_force_biased is not None,
            "--moe-enable-routing-replay": self.moe_enable_routing_replay,
            f"--moe-router-load-balancing-type {' '.join(kinds)}": losses,
            "--moe-router-pre-softmax": by_expert and self.moe_router_pre_softmax,
            "--moe-token-drop-policy": by_expert and self.moe_token_drop_policy != "probs",
            "--moe-pad-expert-input-to-capacity": (
                by_expert and self.moe_pad_expert_input_to_capacity
            ),
        }
        found = [name for name, is_on in clashes.items() if is_on]
        if found:
            why = (
                "every expert takes exactly its capacity, weighted by scores over all experts"
                if by_expert
                else "a hash alone says which experts a token has"
            )
            yield (
                f"--moe-router-type {self.moe_router_type} excludes {', '.join(found)}: {why}; "
                "leave one or the other out"
            )

    def _overlap_problems(self) -> Iterator[str]:
        if not self.moe_shared_expert_overlap:
            return
        flag = "--moe-shared-expert-overlap"
        if self.moe_shared_expert_intermediate_size is None:
            yield (
                f"{flag} needs shared experts: add --moe-shared-expert-intermediate-size, or leave "
                "it out"
            )
        if self.moe_token_dispatcher_type == "allgather":
            yield (
                f"{flag} needs an all-to-all to hide behind: use --moe-token-dispatcher-type "
                "alltoall"
            )
        if self.moe_expert_chunk_tokens is not None:
            yield (
                f"{flag} contradicts --moe-expert-chunk-tokens {self.moe_expert_chunk_tokens}: "
                "chunks travel one by one, shared experts are one piece; leave one out"
            )

    def _group_problems(self, num_experts: int) -> Iterator[str]:
        groups, group_topk = self.moe_router_num_groups, self.moe_router_group_topk
        judges = self.moe_router_group_score_topk
        if groups is None and group_topk is None:
            if judges is not None:
                yield (
                    f"--moe-router-group-score-topk {judges} needs groups of experts: add "
                    "--moe-router-num-groups and --moe-router-group-topk, or leave it out"
                )
            return
        if groups is None or group_topk is None:
            yield "--moe-router-num-groups and --moe-router-group-topk need each other; give both"
            return
        shown = f"--moe-router-group-topk {group_topk}"
        if num_experts % groups:
            yield f"--moe-router-num-groups {groups} must divide --num-experts {num_experts}"
        elif group_topk > groups:
            yield f"{shown} must not be larger than --moe-router-num-groups {groups}"
        elif judges is not None and judges > num_experts // groups:
            yield (
                f"--moe-router-group-score-topk {judges} must not be larger than a group of "
                f"{num_experts // groups} experts (--num-experts {num_experts} / "
                f"--moe-router-num-groups {groups})"
            )
        elif judges is None and self.moe_router_topk % group_topk:
            yield (
                f"--moe-router-topk {self.moe_router_topk} must be a multiple of {shown}: a group "
                "is judged by its best topk / group-topk experts; or give "
                "--moe-router-group-score-topk"
            )
        elif self.moe_router_topk > group_topk * (num_experts // groups):
            yield (
                f"--moe-router-topk {self.moe_router_topk} does not fit in {shown} groups of "
                f"{num_experts // groups} experts (--num-experts {num_experts} / "
                f"--moe-router-num-groups {groups})"
            )

    def _balancing_problems(self) -> Iterator[str]:
        kinds, coeffs = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        shown = f"--moe-router-load-balancing-type {' '.join(kinds)}"
        if len(set(kinds)) < len(kinds):
            yield f"{shown} names one way twice"
        elif alone := [k for k in kinds if k in ("none", *BALANCED_CHOICES) and len(kinds) > 1]:
            yield f"{shown}: {alone[0]} excludes the others"
        elif "none" not in kinds and coeffs is not None and len(coeffs) != len(kinds):
            yield (
                f"--moe-aux-loss-coeff {' '.join(map(str, coeffs))} has {len(coeffs)} values for "
                f"the {len(kinds)} of {shown}; give one for each"
            )

    @property
    def chooses_by_expert(self) -> bool:
        """Whether, in training, experts choose tokens and not tokens experts."""
        return self.moe_router_type == "expert_choice"

    @property
    def max_experts_per_token(self) -> int:
        """Experts that one token is sent to at most: all, when any token may be taken by all."""
        assert self.num_moe_experts is not None, "a dense layer has no experts"
        any_number = self.moe_pad_expert_input_to_capacity or self.chooses_by_expert
        return self.num_moe_experts if any_number else self.moe_router_topk

    @property
    def is_topk_exact(self) -> bool:
        """Whether every token is sent to exactly ``max_experts_per_token`` experts."""
        return self.moe_expert_capacity_factor is None and not self.chooses_by_expert

    @property
    def aux_loss_coeffs(self) -> dict[str, float]:
        """Balancing type -> coefficient of the losses in force, those of 0 left out.

        None where tokens do not choose their experts: there is nothing that a loss could balance.
        """
        if self.moe_router_type != "topk":
            return {}
        no_loss = ("none", *BALANCED_CHOICES)
        kinds = [kind for kind in self.moe_router_load_balancing_type if kind not in no_loss]
        coeffs = self.moe_aux_loss_coeff
        coeffs = [0.01] * len(kinds) if coeffs is None else coeffs
        return {kind: coeff for kind, coeff in zip(kinds, coeffs, strict=False) if coeff}


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]
