"""Megatron's old functions that gather balance losses by layer, by its names and signatures.

For users' layers that record losses themselves. Our routers record into a ``MoEMetricsTracker``
instead, which belongs to a run; here one tracker serves the process, as there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_reduce_sum


@dataclass
class TrackedLoss:
    """One kind of loss since the last ``clear_aux_losses_tracker``."""

    values: Tensor
    """[num_layers], summed over microbatches."""
    reduce_group: ProcessGroup | None = None
    """Ranks whose values are summed."""
    avg_group: ProcessGroup | None = None
    """Ranks whose values are averaged."""
    reduce_group_has_dp: bool = False
    """Whether ``reduce_group`` has the data ranks, so that no mean is taken over them."""


_tracker: dict[str, TrackedLoss] = {}


def get_moe_layer_wise_logging_tracker() -> dict[str, TrackedLoss]:
    """Return name -> what was recorded."""
    return _tracker


def save_to_aux_losses_tracker(
    name: str,
    loss: Tensor,
    layer_number: int | None,
    num_layers: int,
    reduce_group: ProcessGroup | None = None,
    avg_group: ProcessGroup | None = None,
    reduce_group_has_dp: bool = False,
) -> None:
    """Add a loss of one layer and microbatch.

    Args:
        name: Such as "load_balancing_loss".
        loss: Scalar.
        layer_number: From 1, as Megatron counts; None records nothing.
        num_layers: Of the model.
        reduce_group: Ranks to sum over when reported.
        avg_group: Ranks to average over when reported.
        reduce_group_has_dp: Take no mean over the data ranks.
    """
    if layer_number is None:
        return
    if name not in _tracker:
        _tracker[name] = TrackedLoss(torch.zeros(num_layers, device=loss.device))
    entry = _tracker[name]
    entry.values[layer_number - 1] += loss.detach()
    entry.reduce_group, entry.avg_group = reduce_group, avg_group
    entry.reduce_group_has_dp = reduce_group_has_dp


def clear_aux_losses_tracker() -> None:
    """Forget all values and groups, and keep the names."""
    for name, entry in _tracker.items():
        _tracker[name] = TrackedLoss(torch.zeros_like(entry.values))


def reduce_aux_losses_tracker_across_ranks(track_names: Sequence[str] | None = None) -> None:
    """Sum over stages and reduce groups, average over average groups and data ranks.

    Every rank calls this, with the same names; all of them when None.
    """
    for name in track_names or list(_tracker):
        entry = _tracker[name]
        if parallel_state.model_parallel_is_initialized():
            stages = parallel_state.get_pipeline_model_parallel_group()
            entry.values = all_reduce_sum(stages, entry.values)
        if entry.reduce_group is not None:
            entry.values = all_reduce_sum(entry.reduce_group, entry.values)
        if entry.avg_group is not None:
            entry.values = _mean(entry.avg_group, entry.values)
        if parallel_state.model_parallel_is_initialized() and not entry.reduce_group_has_dp:
            data_ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
            entry.values = _mean(data_ranks, entry.values)


def track_moe_metrics(  # noqa: PLR0913 (Megatron's signature)
    loss_scale: float | Tensor,
    iteration: int,
    writer: Any = None,
    wandb_writer: Any = None,
    total_loss_dict: dict[str, Tensor] | None = None,
    per_layer_logging: bool = False,
    force_initialize: bool = False,
    track_names: Sequence[str] | None = None,
    num_layers: int | None = None,
    moe_layer_freq: int | Sequence[int] | None = None,
    mtp_num_layers: int | None = None,
) -> None:
    """Report the mean of each loss over the MoE layers, and begin anew.

    Args:
        loss_scale: What values are multiplied by, 1 / microbatches.
        iteration: Of the report.
        writer: With ``add_scalar(name, value, iteration)``, or None.
        wandb_writer: With ``log({name: value}, iteration)``, or None.
        total_loss_dict: Where the means are added up by name.
        per_layer_logging: Also write ``moe/NAME_layer_N`` for each layer, from 0.
        force_initialize: Make ``track_names`` with zeros, on ranks that record nothing.
        track_names: Kinds to report; all when None.
        num_layers: For ``force_initialize``, and for a frequency of MoE layers.
        moe_layer_freq: Which layers are MoE: every N-th, or a pattern; all when None.
        mtp_num_layers: Further layers, all MoE.
    """
    if force_initialize:
        assert num_layers is not None, "force_initialize needs num_layers"
        for name in track_names or ():
            _tracker.setdefault(name, TrackedLoss(torch.zeros(num_layers + (mtp_num_layers or 0))))
    reduce_aux_losses_tracker_across_ranks(track_names)
    for name in track_names or list(_tracker):
        values = _tracker[name].values.float() * loss_scale
        mean = values.sum() / _moe_layers(len(values), num_layers, moe_layer_freq, mtp_num_layers)
        if total_loss_dict is not None:
            total_loss_dict[name] = total_loss_dict.get(name, torch.zeros_like(mean)) + mean
        shown = {name: mean}
        if per_layer_logging:
            shown |= {f"moe/{name}_layer_{layer}": value for layer, value in enumerate(values)}
        for key, value in shown.items():
            if writer is not None:
                writer.add_scalar(key, value, iteration)
            if wandb_writer is not None:
                wandb_writer.log({key: value}, iteration)
    clear_aux_losses_tracker()


def _mean(group: ProcessGroup, values: Tensor) -> Tensor:
    return all_reduce_sum(group, values) / group.size()


def _moe_layers(
    recorded: int,
    num_layers: int | None,
    freq: int | Sequence[int] | None,
    further: int | None,
) -> int:
    """Return over how many layers the mean is taken."""
    if freq is None:
        return recorded
    if isinstance(freq, int):
        layers = recorded - (further or 0) if num_layers is None else num_layers
        return len(range(0, layers, freq)) + (further or 0)
    return sum(freq) + (further or 0)
