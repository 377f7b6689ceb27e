"""How evenly experts are used: recorded by routers, folded every step, reduced when reported.

A router *assigns* into the slot [layer, microbatch], so a recomputed forward cannot count twice.
Nothing here waits for the device before ``report``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.transformer.moe.slot_means import SlotMeans

_LOSSES = (
    "load_balancing_loss",
    "z_loss",
    "entropy",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "dropped_fraction",
)
WARN_MAX_VIOLATION = 2.0
"""Busiest expert at three times the mean: ``MoEReport.warnings`` tells from here on."""
_COUNTS_SHOWN = 16


@dataclass(frozen=True)
class MoEReport:
    """Expert use over one log interval, over all data ranks; the same on every rank."""

    moe_layers: tuple[int, ...]
    """Global indices of the MoE layers, which the other fields follow."""
    tokens_per_expert: Tensor
    """[layers, num_experts], int64, on the CPU; each row sums to tokens * topk. Layers with fewer
    experts than others have 0 beyond their own."""
    load_balancing_loss: float | None
    """Mean over layers and microbatches, without its coefficient; 1.0 is balanced."""
    z_loss: float | None
    """Mean over layers and microbatches, without its coefficient; None when it is off."""
    max_violation: tuple[float, ...]
    """Busiest expert / mean - 1: 0.0 is balanced."""
    min_violation: tuple[float, ...]
    """Idlest expert / mean - 1: -1.0 is an expert without tokens."""
    dead_experts: tuple[int, ...]
    """Experts without any token."""
    entropy: tuple[float, ...]
    """Mean over tokens of the entropy of the router's softmax, in nats."""
    dropped_fraction: tuple[float, ...] | None
    """Share of the (token, expert) pairs over the experts' capacity; None without a capacity."""
    ep_load_ratio: float
    """Tokens of the busiest expert-parallel rank / mean, in the worst layer."""
    seq_load_balancing_loss: float | None = None
    """As ``load_balancing_loss``, within each sequence; None when it is off."""
    global_load_balancing_loss: float | None = None
    """As ``load_balancing_loss``, within the batches of all ranks; None when it is off."""
    num_experts: tuple[int, ...] | None = None
    """Of each layer; None when all have as many as ``tokens_per_expert`` has columns."""

    def counts_by_layer(self) -> list[Tensor]:
        """Return the tokens per expert of each layer, [its own number of experts]."""
        return _own_columns(self.tokens_per_expert, self.num_experts)

    def lines(self) -> list[str]:
        """Return one line a layer for people; ``warnings`` tells what is wrong with them."""
        rows = zip(
            self.moe_layers,
            self.counts_by_layer(),
            self.max_violation,
            self.min_violation,
            self.dead_experts,
            self.entropy,
            strict=True,
        )
        text = [
            f"MoE layer {layer}: tokens/expert {_show(counts)} | max violation {high:+.1%} | "
            f"min violation {low:+.1%} | dead experts {dead} | entropy {entropy:.3f} nats"
            for layer, counts, high, low, dead, entropy in rows
        ]
        if self.dropped_fraction is not None:
            shares = zip(text, self.dropped_fraction, strict=True)
            text = [f"{line} | dropped {share:.2%}" for line, share in shares]
        return text

    def warnings(self) -> list[str]:
        """Return a sentence for each kind of trouble, naming the layers; empty when all is well."""
        rows = zip(self.moe_layers, self.dead_experts, self.counts_by_layer(), strict=True)
        dead = [f"{layer} ({count} of {len(counts)})" for layer, count, counts in rows if count]
        skewed = [
            f"{layer} ({high + 1:.1f} x the mean)"
            for layer, high in zip(self.moe_layers, self.max_violation, strict=True)
            if high >= WARN_MAX_VIOLATION
        ]
        advice = "raise --moe-aux-loss-coeff if it stays so"
        text = []
        if dead:
            text.append(f"experts without tokens in MoE layers {', '.join(dead)}; {advice}")
        if skewed:
            text.append(f"routing collapses in MoE layers {', '.join(skewed)}; {advice}")
        return text

    def scalars(self) -> dict[str, float]:
        """Return the metrics by name, summed up and for each layer."""
        found: dict[str, float] = {
            "moe/max_violation_max": max(self.max_violation, default=0.0),
            "moe/min_violation_min": min(self.min_violation, default=0.0),
            "moe/dead_experts_sum": float(sum(self.dead_experts)),
            "moe/entropy_mean_nats": sum(self.entropy) / max(len(self.entropy), 1),
            "moe/ep_load_ratio": self.ep_load_ratio,
        }
        if self.load_balancing_loss is not None:
            found["moe/load_balancing_loss"] = self.load_balancing_loss
        if self.z_loss is not None:
            found["moe/z_loss"] = self.z_loss
        if self.dropped_fraction is not None:
            shares = self.dropped_fraction
            found["moe/dropped_fraction_mean"] = sum(shares) / max(len(shares), 1)
            for layer, share in zip(self.moe_layers, shares, strict=True):
                found[f"moe/layer_{layer}/dropped_fraction"] = share
        if self.seq_load_balancing_loss is not None:
            found["moe/seq_load_balancing_loss"] = self.seq_load_balancing_loss
        if self.global_load_balancing_loss is not None:
            found["moe/global_load_balancing_loss"] = self.global_load_balancing_loss
        for i, layer in enumerate(self.moe_layers):
            found[f"moe/layer_{layer}/max_violation"] = self.max_violation[i]
            found[f"moe/layer_{layer}/min_violation"] = self.min_violation[i]
            found[f"moe/layer_{layer}/dead_experts"] = float(self.dead_experts[i])
            found[f"moe/layer_{layer}/entropy_nats"] = self.entropy[i]
        return found


class MoEMetricsTracker:
    """Holds the slots of one step and the sums of one interval, on the device."""

    def __init__(
        self,
        moe_layers: Sequence[int],
        num_experts: int | Sequence[int],
        topk: int,
        num_microbatches: int,
        device: torch.device | str,
    ) -> None:
        """Make empty slots.

        Args:
            moe_layers: Global indices of the MoE layers of this rank.
            num_experts: Of each of them, one number for all or one for each.
            topk: Experts per token, the largest of all layers.
            num_microbatches: In one optimizer step.
            device: Where routers compute.
        """
        self._row_of_layer = {layer: row for row, layer in enumerate(moe_layers)}
        self.topk = topk
        slots = (len(moe_layers), num_microbatches)
        numbers = [num_experts] * len(moe_layers) if isinstance(num_experts, int) else num_experts
        self._num_experts = tuple(numbers)
        most = max(self._num_experts, default=0)
        self._counts = torch.zeros(*slots, most, dtype=torch.int64, device=device)
        self._best_counts = torch.zeros_like(self._counts)
        self._losses = torch.zeros(*slots, len(_LOSSES), dtype=torch.float64, device=device)
        self._has: set[str] = set()
        self._quantiles: SlotMeans | None = None
        self._count_sums = torch.zeros_like(self._counts[:, 0])
        self._loss_sums = torch.zeros_like(self._losses[:, 0])
        self._microbatches = 0

    def record(
        self,
        layer: int,
        microbatch: int,
        *,
        tokens_per_expert: Tensor,
        load_balancing_loss: Tensor | None,
        z_loss: Tensor | None,
        entropy: Tensor,
        seq_load_balancing_loss: Tensor | None = None,
        global_load_balancing_loss: Tensor | None = None,
    ) -> None:
        """Assign the values of one router in one microbatch; a second time changes nothing.

        Args:
            layer: Global index of the layer.
            microbatch: Slot within the step.
            tokens_per_expert: [num_experts], int64, of this rank's tokens.
            load_balancing_loss: Scalar without its coefficient, or None.
            z_loss: Scalar without its coefficient, or None.
            entropy: Scalar, nats.
            seq_load_balancing_loss: As ``load_balancing_loss``.
            global_load_balancing_loss: As ``load_balancing_loss``.
        """
        row = self._row_of_layer[layer]
        self._counts[row, microbatch, : len(tokens_per_expert)] = tokens_per_expert
        values = (
            load_balancing_loss,
            z_loss,
            entropy,
            seq_load_balancing_loss,
            global_load_balancing_loss,
        )
        for column, (name, value) in enumerate(zip(_LOSSES, values, strict=False)):
            if value is not None:
                self._losses[row, microbatch, column] = value
                self._has.add(name)

    def record_dropped(self, layer: int, microbatch: int, share: Tensor) -> None:
        """Assign the share of pairs that one layer dropped in one microbatch, a scalar."""
        slot = self._row_of_layer[layer], microbatch, _LOSSES.index("dropped_fraction")
        self._losses[slot] = share
        self._has.add("dropped_fraction")

    def counts_so_far(self, layer: int, microbatch: int, best_counts: Tensor) -> Tensor:
        """Keep the counts of a microbatch and return their sum over it and those before it.

        Args:
            layer: Global index of the layer.
            microbatch: Slot within the step; assigned, so that a recomputed forward counts once.
            best_counts: [num_experts], of this rank's tokens, as balance losses count them.
        """
        row = self._row_of_layer[layer]
        own = self._best_counts[row, :, : len(best_counts)]
        own[microbatch] = best_counts
        return own[: microbatch + 1].sum(dim=0)

    def step_counts(self, group: ProcessGroup) -> dict[int, Tensor]:
        """Return layer -> tokens per expert of the step so far, [num_experts] int64.

        Over all its microbatches and the ranks of ``group``, which must all call this.
        """
        counts = all_reduce_sum(group, self._counts.sum(dim=1))
        return dict(zip(self._row_of_layer, _own_columns(counts, self._num_experts), strict=True))

    def record_quantiles(
        self, layer: int, microbatch: int, quantiles: Tensor, num_tokens: int | Tensor
    ) -> None:
        """Assign the ``expert_quantiles`` [num_experts] of one layer in one microbatch.

        Args:
            layer: Global index of the layer.
            microbatch: Slot within the step.
            quantiles: [num_experts], of this rank's tokens.
            num_tokens: How many tokens they are of.
        """
        if self._quantiles is None:
            rows, slots, width = self._counts.shape
            self._quantiles = SlotMeans(rows, slots, width, self._counts.device)
        self._quantiles.assign(self._row_of_layer[layer], microbatch, quantiles, num_tokens)

    def step_quantiles(self, group: ProcessGroup) -> dict[int, tuple[Tensor, Tensor]]:
        """Return layer -> quantiles [num_experts] fp64, a mean over tokens, and their number [].

        Over all microbatches of the step and the ranks of ``group``, which must all call this.
        """
        assert self._quantiles is not None, "no forward of this step was recorded"
        means, weights = self._quantiles.means(group)
        return {layer: (means[row], weights[row]) for layer, row in self._row_of_layer.items()}

    def end_step(self) -> None:
        """Add the slots to the interval and empty them; no communication."""
        self._count_sums += self._counts.sum(dim=1)
        self._loss_sums += self._losses.sum(dim=1)
        self._microbatches += self._counts.shape[1]
        self._counts.zero_()
        self._best_counts.zero_()
        self._losses.zero_()
        if self._quantiles is not None:
            self._quantiles.clear()

    def report(self, pg_collection: ProcessGroupCollection) -> MoEReport:
        """Reduce the interval over ``dp_cp``, start a new one, and say how it was.

        Every rank of the group must call this.
        """
        group, ep = pg_collection.dp_cp, pg_collection.ep.size()
        counts = all_reduce_sum(group, self._count_sums).cpu()
        weight = max(self._microbatches, 1) * group.size()
        means = (all_reduce_sum(group, self._loss_sums) / weight).cpu()  # [layers, losses]
        self._count_sums = torch.zeros_like(self._count_sums)
        self._loss_sums = torch.zeros_like(self._loss_sums)
        self._microbatches = 0
        by_layer = _own_columns(counts, self._num_experts)
        by_rank = [own.view(ep, -1).sum(dim=1) for own in by_layer]
        return MoEReport(
            moe_layers=tuple(self._row_of_layer),
            tokens_per_expert=counts,
            load_balancing_loss=self._mean_loss(means, "load_balancing_loss"),
            z_loss=self._mean_loss(means, "z_loss"),
            seq_load_balancing_loss=self._mean_loss(means, "seq_load_balancing_loss"),
            global_load_balancing_loss=self._mean_loss(means, "global_load_balancing_loss"),
            num_experts=self._num_experts,
            max_violation=tuple(_over_mean(own.amax(), own) for own in by_layer),
            min_violation=tuple(_over_mean(own.amin(), own) for own in by_layer),
            dead_experts=tuple(int((own == 0).sum()) for own in by_layer),
            entropy=tuple(means[:, _LOSSES.index("entropy")].tolist()),
            dropped_fraction=self._means_of_layers(means, "dropped_fraction"),
            ep_load_ratio=1.0 + max((_over_mean(own.amax(), own) for own in by_rank), default=0.0),
        )

    def _means_of_layers(self, means: Tensor, name: str) -> tuple[float, ...] | None:
        return tuple(means[:, _LOSSES.index(name)].tolist()) if name in self._has else None

    def _mean_loss(self, means: Tensor, name: str) -> float | None:
        return means[:, _LOSSES.index(name)].mean().item() if name in self._has else None


def _own_columns(counts: Tensor, num_experts: Sequence[int] | None) -> list[Tensor]:
    """Return the rows of ``counts`` [layers, most experts], each as long as it has experts."""
    numbers = num_experts or [counts.shape[1]] * len(counts)
    return [row[:own] for row, own in zip(counts, numbers, strict=True)]


def _over_mean(extreme: Tensor, counts: Tensor) -> float:
    """Return extreme / mean - 1 of the ``counts`` of one layer; 0.0 where nothing was counted."""
    mean = counts.double().mean()
    return torch.where(mean > 0, extreme / mean - 1, 0.0).item()


def _show(counts: Tensor) -> str:
    """Show the counts of one layer, or only their range when there are many."""
    if len(counts) <= _COUNTS_SHOWN:
        return "[" + " ".join(map(str, counts.tolist())) + "]"
    low, middle, high = counts.min(), counts.median(), counts.max()
    return f"min {low} median {middle} max {high} of {len(counts)} experts"
