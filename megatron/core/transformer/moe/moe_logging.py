"""How evenly experts are used: recorded by routers, folded every step, reduced when reported.

A router *assigns* into the slot [layer, microbatch], so a recomputed forward cannot count twice.
Nothing here waits for the device before ``report``. Layers may differ in experts and top-k: counts
are padded to the largest number of experts.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.transformer.moe.moe_report import LayerUse, MoEReport
from megatron.core.transformer.moe.slot_means import SlotMeans

__all__ = ["LayerUse", "MoEMetricsTracker", "MoEReport"]

_LOSSES = (
    "load_balancing_loss",
    "z_loss",
    "entropy",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "dropped_fraction",
)
_COLUMN = {name: column for column, name in enumerate(_LOSSES)}
_OF_ALL_TOKENS = [_COLUMN["z_loss"], _COLUMN["global_load_balancing_loss"]]
"""Sums over tokens divided by the mean number of them (``ForwardContext.mean_valid_tokens``): a
microbatch without tokens counts, as 0."""


class MoEMetricsTracker:
    """Holds the slots of one step and the sums of one interval, on the device."""

    def __init__(
        self,
        moe_layers: Sequence[int],
        num_experts: int | Sequence[int],
        topk: int | Sequence[int],
        num_microbatches: int,
        device: torch.device | str,
    ) -> None:
        """Make empty slots.

        Args:
            moe_layers: Global indices of the MoE layers of this rank.
            num_experts: Of each of them; one number when they are alike.
            topk: Experts per token of each of them, or one number.
            num_microbatches: In one optimizer step.
            device: Where routers compute.
        """
        self._row_of_layer = {layer: row for row, layer in enumerate(moe_layers)}
        self.moe_layers = tuple(moe_layers)
        self.num_experts = _one_each(num_experts, len(moe_layers))
        self.topk = _one_each(topk, len(moe_layers))
        slots = (len(moe_layers), num_microbatches)
        widest = max(self.num_experts, default=0)
        self._counts = torch.zeros(*slots, widest, dtype=torch.int64, device=device)
        self._best_counts = torch.zeros_like(self._counts)
        self._losses = torch.zeros(*slots, len(_LOSSES), dtype=torch.float64, device=device)
        self._is_filled = torch.zeros(*slots, 1, dtype=torch.bool, device=device)
        self._has: set[tuple[int, str]] = set()
        self._biases: dict[int, Tensor] = {}
        self._columns: dict[tuple[str, ...], Tensor] = {}
        self._quantiles: SlotMeans | None = None
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._count_sums = torch.zeros_like(self._counts[:, 0])
        self._loss_sums = torch.zeros_like(self._losses[:, 0])
        self._finite = torch.zeros_like(self._loss_sums)
        """[layers, losses]: how many values ``_loss_sums`` holds."""
        self._left_out = torch.zeros_like(self._loss_sums[:, 0])

    def record(
        self,
        layer: int,
        microbatch: int,
        *,
        tokens_per_expert: Tensor,
        expert_bias: Tensor | None = None,
        **values: Tensor | None,
    ) -> None:
        """Assign the values of one router in one microbatch; a second time changes nothing.

        Args:
            layer: Global index of the layer.
            microbatch: Slot within the step.
            tokens_per_expert: [num_experts of the layer], int64, of this rank's tokens without
                padding.
            expert_bias: [num_experts], looked at again in ``report``; None without.
            **values: Scalars: the names of ``LayerUse.means``; losses without their coefficients.
                Where ranks share a microbatch, parts that add up to its values.
                None for one that is off. A layer gives the same names in all microbatches.
        """
        row = self._row_of_layer[layer]
        self._counts[row, microbatch, : len(tokens_per_expert)] = tokens_per_expert
        self._is_filled[row, microbatch] = True
        if expert_bias is not None:
            self._biases[row] = expert_bias
        found = {name: value for name, value in values.items() if value is not None}
        if found:
            self._assign(row, microbatch, found)

    def record_dropped(self, layer: int, microbatch: int, share: Tensor) -> None:
        """Assign the share of pairs that one layer dropped in one microbatch, a scalar."""
        self._assign(self._row_of_layer[layer], microbatch, {"dropped_fraction": share})

    def _assign(self, row: int, microbatch: int, found: dict[str, Tensor]) -> None:
        names = tuple(found)
        if names not in self._columns:
            columns = torch.tensor([_COLUMN[name] for name in names])
            self._columns[names] = columns.to(self._losses.device)
        self._has.update((row, name) for name in names)
        together = torch.stack([value.detach().double() for value in found.values()])
        self._losses[row, microbatch].index_copy_(0, self._columns[names], together)

    def counts_so_far(self, layer: int, microbatch: int, best_counts: Tensor) -> Tensor:
        """Keep the counts of a microbatch and return their sum over it and those before it.

        Args:
            layer: Global index of the layer.
            microbatch: Slot within the step; assigned, so that a recomputed forward counts once.
            best_counts: [num_experts], of this rank's tokens, as balance losses count them.
        """
        row, size = self._row_of_layer[layer], len(best_counts)
        self._best_counts[row, microbatch, :size] = best_counts
        return self._best_counts[row, : microbatch + 1, :size].sum(dim=0)

    def step_counts(self, group: ProcessGroup) -> dict[int, Tensor]:
        """Return layer -> tokens per expert of the step so far, [num_experts] int64.

        Over all its microbatches and the ranks of ``group``, which must all call this.
        """
        counts = all_reduce_sum(group, self._counts.sum(dim=1))
        return {
            layer: counts[row, : self.num_experts[row]] for layer, row in self._row_of_layer.items()
        }

    def record_quantiles(
        self, layer: int, microbatch: int, quantiles: Tensor, num_tokens: int | Tensor
    ) -> None:
        """Assign the ``expert_quantiles`` [num_experts] of one layer in one microbatch.

        Args:
            layer: Global index of the layer.
            microbatch: Slot within the step.
            quantiles: [num_experts of the layer], of the tokens of the microbatch: the same on all
                ranks that share it.
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
        return {
            layer: (means[row, : self.num_experts[row]], weights[row])
            for layer, row in self._row_of_layer.items()
        }

    def end_step(self, shares: ProcessGroup | None = None) -> None:
        """Add the slots to the interval and empty them.

        Args:
            shares: Ranks that have shares of each microbatch (``tp_cp``), whose slots are summed;
                all of them call this. None, or one rank: no communication.

        A value that is not finite is counted and left out; so are the counts of a router whose
        logits were not finite, which shows in its entropy. A slot without tokens (all padding) is
        in no mean but of the losses that are sums over all tokens of the step.
        """
        if shares is not None:
            self._counts.copy_(all_reduce_sum(shares, self._counts))
            self._losses.copy_(all_reduce_sum(shares, self._losses))
        finite = self._losses.isfinite()  # [layers, microbatches, losses]
        routed = finite[:, :, _COLUMN["entropy"], None]
        self._count_sums += (self._counts * routed).sum(dim=1)
        is_counted = finite & (self._counts.sum(dim=2, keepdim=True) > 0)
        of_all = finite & self._is_filled
        for column in _OF_ALL_TOKENS:  # a list would be copied to the device, and waited for
            is_counted[..., column] = of_all[..., column]
        self._loss_sums += self._losses.where(is_counted, 0.0).sum(dim=1)
        self._finite += is_counted.sum(dim=1)
        self._left_out += (~finite).any(dim=2).sum(dim=1)
        self._counts.zero_()
        self._best_counts.zero_()
        self._losses.zero_()
        self._is_filled.zero_()
        if self._quantiles is not None:
            self._quantiles.clear()

    def report(self, pg_collection: ProcessGroupCollection) -> MoEReport:
        """Reduce the interval over ``dp`` and ``pp``, start a new one, and say how it was.

        Every rank of these groups must call this; all get the report of all layers.
        """
        # those that share microbatches have the same; a layer is zeros where it is not
        groups = pg_collection.dp, pg_collection.pp
        counts = _sum_over(groups, self._count_sums).cpu()
        folded = torch.cat([self._loss_sums, self._finite, self._left_out.unsqueeze(1)], dim=1)
        sums, finite, left_out = (
            _sum_over(groups, folded).cpu().split([len(_LOSSES), len(_LOSSES), 1], dim=1)
        )
        means = sums / finite  # 0 / 0, NaN, where nothing was finite
        has, biases = self._of_all_stages(pg_collection.pp)
        self._begin_interval()
        return MoEReport(
            tuple(
                LayerUse(
                    layer=layer,
                    tokens_per_expert=counts[row, : self.num_experts[row]],
                    topk=self.topk[row],
                    ep_blocks=pg_collection.ep.size(),
                    means={
                        name: means[row, column].item()
                        for name, column in _COLUMN.items()
                        if (row, name) in has
                    },
                    expert_bias=biases.get(row),
                    left_out=int(left_out[row]),
                )
                for layer, row in self._row_of_layer.items()
            )
        )

    def _of_all_stages(
        self, group: ProcessGroup
    ) -> tuple[set[tuple[int, str]], dict[int, tuple[float, float]]]:
        """Return which values layers have, and the ranges of their biases, of all stages."""
        mine = self._has, self._bias_ranges()
        every = [mine] * group.size()
        if group.size() > 1:
            dist.all_gather_object(every, mine, group=group)
        has = {name for found, _ in every for name in found}
        return has, {row: found for _, biases in every for row, found in biases.items()}

    def _bias_ranges(self) -> dict[int, tuple[float, float]]:
        if not self._biases:
            return {}
        ranges = torch.stack([torch.stack(bias.aminmax()) for bias in self._biases.values()])
        return {
            row: (low, high) for row, (low, high) in zip(self._biases, ranges.tolist(), strict=True)
        }


def _sum_over(groups: Sequence[ProcessGroup], x: Tensor) -> Tensor:
    for group in groups:
        x = all_reduce_sum(group, x)
    return x


def _one_each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    assert len(values) == count, f"{len(values)} values for {count} MoE layers"
    return values
