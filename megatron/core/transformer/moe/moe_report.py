"""What one log interval says of the experts: figures, lines for people, scalars, warnings. Pure.

Every figure follows from integer counts and from means over the microbatches of all ranks. A layer
has its own number of experts and its own top-k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BALANCE_LOSSES = (
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
)
"""Names of the losses, as Megatron-LM logs them; those that are off are in no report."""

WARN_MAX_VIOLATION = 2.0
"""Busiest expert at three times the mean: a collapse, where top-k lets it be so uneven."""
WARN_SHARE_OF_WORST = 0.75
"""With few experts: three quarters of the worst violation there can be, experts / top-k - 1."""
WARN_EP_LOAD_RATIO = 2.0
"""Busiest expert-parallel rank at twice the mean; with few ranks, half of the way to the worst."""
_COUNTS_SHOWN = 16


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """How one MoE layer used its experts, over all data ranks."""

    layer: int
    """Global index."""
    tokens_per_expert: Tensor
    """[num_experts], int64, on the CPU; sums to tokens * topk, without padding and without the
    microbatches in ``left_out``."""
    topk: int
    ep_blocks: int = 1
    """Blocks of neighbouring experts, one for each expert-parallel rank."""
    means: Mapping[str, float] = field(default_factory=dict)
    """Name -> mean over microbatches and ranks of a loss without its coefficient, of ``entropy``
    (nats) or of ``dropped_fraction``; NaN when no value was finite. What is off is not there."""
    expert_bias: tuple[float, float] | None = None
    """Least and largest bias; None for a layer without."""
    left_out: int = 0
    """Microbatches of a rank with a value that was not finite; that value is in no mean, and counts
    are left out when the router's logits were not finite."""

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.tokens_per_expert)

    @cached_property
    def max_violation(self) -> float:
        """Busiest expert / mean - 1: 0.0 is balanced, or nothing was counted."""
        return _over_mean(int(self.tokens_per_expert.max()), self.tokens_per_expert)

    @cached_property
    def min_violation(self) -> float:
        """Idlest expert / mean - 1: -1.0 is an expert without tokens."""
        return _over_mean(int(self.tokens_per_expert.min()), self.tokens_per_expert)

    @cached_property
    def variation(self) -> float:
        """Coefficient of variation of the counts: standard deviation / mean."""
        counts = self.tokens_per_expert.double()
        mean = counts.mean().item()
        return counts.std(correction=0).item() / mean if mean else 0.0

    @cached_property
    def dead_experts(self) -> int:
        """Experts without any token."""
        return int((self.tokens_per_expert == 0).sum())

    @cached_property
    def ep_load_ratio(self) -> float:
        """Tokens of the busiest expert-parallel rank / mean; 1.0 is balanced."""
        by_rank = self.tokens_per_expert.view(self.ep_blocks, -1).sum(dim=1)
        return 1.0 + _over_mean(int(by_rank.max()), by_rank)

    @property
    def is_collapsing(self) -> bool:
        """Whether the busiest expert has far more than its part."""
        worst = self.num_experts / self.topk - 1
        bound = min(WARN_MAX_VIOLATION, WARN_SHARE_OF_WORST * worst)
        return worst > 0 and self.max_violation >= bound

    @property
    def is_rank_overloaded(self) -> bool:
        """Whether the busiest expert-parallel rank has far more than its part."""
        worst = min(self.ep_blocks, self.num_experts / self.topk)
        bound = min(WARN_EP_LOAD_RATIO, (1 + worst) / 2)
        return worst > 1 and self.ep_load_ratio >= bound

    def scalars(self) -> dict[str, float]:
        """Return the figures by short name; losses are not among them."""
        found = {
            "max_violation": self.max_violation,
            "min_violation": self.min_violation,
            "variation": self.variation,
            "dead_experts": float(self.dead_experts),
            "ep_load_ratio": self.ep_load_ratio,
            "left_out": float(self.left_out),
        }
        if "entropy" in self.means:
            found["entropy_nats"] = self.means["entropy"]
        if "dropped_fraction" in self.means:
            found["dropped_fraction"] = self.means["dropped_fraction"]
        if self.expert_bias is not None:
            found["expert_bias_min"], found["expert_bias_max"] = self.expert_bias
        return found

    def line(self) -> str:
        """Return a line for people."""
        fields = [
            f"MoE layer {self.layer}: tokens/expert {_show(self.tokens_per_expert)}",
            f"max violation {self.max_violation:+.1%}",
            f"min violation {self.min_violation:+.1%}",
            f"std/mean {self.variation:.3f}",
            f"dead experts {self.dead_experts}",
        ]
        if "entropy" in self.means:
            fields.append(f"entropy {self.means['entropy']:.3f} nats")
        if self.ep_blocks > 1:
            fields.append(f"busiest EP rank {self.ep_load_ratio:.2f} x mean")
        if self.expert_bias is not None:
            fields.append("bias {:+.4f} to {:+.4f}".format(*self.expert_bias))
        if "dropped_fraction" in self.means:
            fields.append(f"dropped {self.means['dropped_fraction']:.2%}")
        if self.left_out:
            fields.append(f"not finite and left out: {self.left_out} microbatches")
        return " | ".join(fields)


@dataclass(frozen=True)
class MoEReport:
    """Expert use over one log interval, over all data ranks; the same on every rank."""

    layers: tuple[LayerUse, ...]
    """In the order of their index."""

    @property
    def tokens_per_expert(self) -> Tensor:
        """[layers, largest num_experts], int64: the counts of all layers, ended with 0."""
        rows = [use.tokens_per_expert for use in self.layers]
        return pad_sequence(rows, batch_first=True)

    def mean(self, name: str) -> float | None:
        """Return the mean over layers of what ``LayerUse.means`` calls ``name``.

        None when it is off in every layer; layers in which no value was finite are left out, and
        NaN is returned when that was so in all of them.
        """
        values = [layer.means[name] for layer in self.layers if name in layer.means]
        finite = [value for value in values if value == value]
        if not values:
            return None
        return sum(finite) / len(finite) if finite else float("nan")

    def losses(self) -> dict[str, float]:
        """Return name -> mean over layers of each loss in force, without its coefficient."""
        found = {name: self.mean(name) for name in BALANCE_LOSSES}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def ep_load_ratio(self) -> float:
        """Tokens of the busiest expert-parallel rank / mean, in the worst layer."""
        return max((layer.ep_load_ratio for layer in self.layers), default=1.0)

    def lines(self) -> list[str]:
        """Return one line a layer for people, and one for all when there are several.

        ``warnings`` tells what is wrong with them.
        """
        lines = [layer.line() for layer in self.layers]
        return [*lines, self._total_line()] if len(lines) > 1 else lines

    def _total_line(self) -> str:
        sums = self.scalars()
        fields = [
            f"all {len(self.layers)} MoE layers: "
            f"max violation {sums['moe/max_violation_max']:+.1%}",
            f"min violation {sums['moe/min_violation_min']:+.1%}",
            f"mean std/mean {sums['moe/variation_mean']:.3f}",
            f"dead experts {sums['moe/dead_experts_sum']:.0f}",
        ]
        if "moe/entropy_mean_nats" in sums:
            fields.append(f"mean entropy {sums['moe/entropy_mean_nats']:.3f} nats")
        if any(use.ep_blocks > 1 for use in self.layers):
            fields.append(f"busiest EP rank {self.ep_load_ratio:.2f} x mean")
        if "moe/expert_bias_min" in sums:
            low, high = sums["moe/expert_bias_min"], sums["moe/expert_bias_max"]
            fields.append(f"bias {low:+.4f} to {high:+.4f}")
        if "moe/dropped_fraction_mean" in sums:
            fields.append(f"mean dropped {sums['moe/dropped_fraction_mean']:.2%}")
        if sums["moe/left_out_sum"]:
            fields.append(f"not finite and left out: {sums['moe/left_out_sum']:.0f} microbatches")
        return " | ".join(fields)

    def warnings(self) -> list[str]:
        """Return a sentence for each kind of trouble, naming the layers; empty when all is well."""
        advice = (
            "if it stays so, balance more: --moe-router-load-balancing-type, --moe-aux-loss-coeff"
        )
        found = (
            (
                "experts without tokens",
                self._tell(lambda x: x.dead_experts > 0, _dead),
                advice,
            ),
            (
                "routing collapses",
                self._tell(lambda x: x.is_collapsing, _busiest),
                advice,
            ),
            (
                "expert-parallel ranks are unevenly loaded",
                self._tell(lambda x: x.is_rank_overloaded, _busiest_rank),
                "all others wait for the busiest; stronger balancing spreads them",
            ),
            (
                "values of the router were not finite and are left out",
                self._tell(lambda x: x.left_out > 0, _left_out),
                "the lines above hold only what was finite",
            ),
        )
        return [f"{what} in MoE layers {which}; {then}" for what, which, then in found if which]

    def _tell(self, is_so: Callable[[LayerUse], bool], detail: Callable[[LayerUse], str]) -> str:
        return ", ".join(f"{x.layer} ({detail(x)})" for x in self.layers if is_so(x))

    def scalars(self, *, per_layer_losses: bool = False) -> dict[str, float]:
        """Return the metrics by name, summed up and for each layer.

        Args:
            per_layer_losses: Also give each loss of each layer, as ``moe/<name>_layer_<index>``.
        """
        if not self.layers:
            return {}
        count = len(self.layers)
        found = {
            "moe/max_violation_max": max(x.max_violation for x in self.layers),
            "moe/min_violation_min": min(x.min_violation for x in self.layers),
            "moe/variation_mean": sum(x.variation for x in self.layers) / count,
            "moe/dead_experts_sum": float(sum(x.dead_experts for x in self.layers)),
            "moe/ep_load_ratio": self.ep_load_ratio,
            "moe/left_out_sum": float(sum(x.left_out for x in self.layers)),
        }
        for name, shown in (("entropy", "_mean_nats"), ("dropped_fraction", "_mean")):
            if (mean := self.mean(name)) is not None:
                found[f"moe/{name}{shown}"] = mean
        if biases := [x.expert_bias for x in self.layers if x.expert_bias is not None]:
            found["moe/expert_bias_min"] = min(low for low, _ in biases)
            found["moe/expert_bias_max"] = max(high for _, high in biases)
        found |= {f"moe/{name}": value for name, value in self.losses().items()}
        for layer in self.layers:
            for name, value in layer.scalars().items():
                found[f"moe/layer_{layer.layer}/{name}"] = value
            if per_layer_losses:
                for name in BALANCE_LOSSES:
                    if name in layer.means:
                        found[f"moe/{name}_layer_{layer.layer}"] = layer.means[name]
        return found


def _over_mean(extreme: int, counts: Tensor) -> float:
    """Return extreme / mean - 1; 0.0 where nothing was counted."""
    total = int(counts.sum())
    return extreme * len(counts) / total - 1 if total else 0.0


def _dead(use: LayerUse) -> str:
    return f"{use.dead_experts} of {use.num_experts}"


def _busiest(use: LayerUse) -> str:
    return f"{use.max_violation + 1:.1f} x the mean"


def _busiest_rank(use: LayerUse) -> str:
    return f"{use.ep_load_ratio:.2f} x the mean of {use.ep_blocks}"


def _left_out(use: LayerUse) -> str:
    return f"{use.left_out} microbatches"


def _show(counts: Tensor) -> str:
    """Show the counts of one layer, or only their range when there are many."""
    if len(counts) <= _COUNTS_SHOWN:
        return "[" + " ".join(map(str, counts.tolist())) + "]"
    low, middle, high = counts.min(), counts.median(), counts.max()
    return f"min {low} median {middle} max {high} of {len(counts)} experts"
