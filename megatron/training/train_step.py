"""One optimizer step, in the order in which things happen: the route of a batch as code.

Every loss is divided by the number of unmasked tokens of the whole global batch before backward,
so that gradients are plain sums over microbatches and ranks, whatever the layout; and multiplied by
the loss scale, which the optimizer takes out again. The update is done by all ranks or by none.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.errors import ConfigError, DataError
from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.router_updates import update_expert_biases, update_quantile_betas
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World
from megatron.training.loss import MaskedLoss
from megatron.training.mtp_losses import MTPLosses, labels_ahead, with_ahead
from megatron.training.run import Run, TrainState

log = logging.getLogger(__name__)

PARAMETERS_TOLD = 5
"""How many parameters with a bad gradient are named."""


class StepOutcome(NamedTuple):
    """What a step tells; the same on every rank."""

    lm_loss: float
    """Sum of the losses of all unmasked tokens of the global batch over their number."""
    grad_norm: float | None
    """Global L2 norm before clipping, of the unscaled loss; None when that was not finite."""
    learning_rate: float
    """The rate this step was made with."""
    updated: bool
    """False when loss or gradient was not finite and the weights stayed as they were."""
    notes: tuple[float, ...]
    """The ranks' reasons to stop, summed (see StopRequest)."""
    loss_scale: float = 1.0
    """What the next loss will be multiplied by."""
    is_search: bool = False
    """The update was skipped for too large a loss scale, which falls: nothing is wrong yet."""
    mtp_losses: tuple[float, ...] = ()
    """Of each depth of multi-token prediction, over the labels that count there."""


def train_step(
    run: Run, state: TrainState, data_iterator: Iterator[Batch], notes: Sequence[float] = ()
) -> StepOutcome:
    """Make one step from ``state``, which the caller then moves on.

    Args:
        run: Model, optimizer and groups.
        state: Iterations and samples before this step.
        data_iterator: Microbatches of this rank, of whole sequences.
        notes: This rank's reasons to stop, to be agreed on with the losses.
    """
    cpu_batches = next_batches(run, data_iterator, mtp_depths=run.config.model.mtp_depths)
    counts = count_tokens(cpu_batches, run.world)  # over the global batch
    batches = [batch.to(run.world.device) for batch in cpu_batches]
    run.scheduler.step(run.optimizer, state.consumed_samples)
    run.model.zero_grad_buffer()
    mtp = MTPLosses.of_step(
        run.config.model,
        counts.ahead,
        num_microbatches=len(batches),
        loss_scale=run.optimizer.grad_scaler.scale,
    )
    losses = run_microbatches(run, state, batches, counts, mtp)
    finalize_model_grads(run.model)
    loss, agreed = agree(losses, counts.loss, notes, run.world)
    grad_norm, updated, is_search = None, math.isfinite(loss), False
    if updated:
        may_fall = run.optimizer.grad_scaler.can_fall
        result = run.optimizer.step()
        grad_norm, updated = result.grad_norm, result.update_successful
        is_search = may_fall and not updated
        if not updated and not is_search:
            _tell_parameters(run.model.nonfinite_gradients())
    else:
        _tell_samples(run.world, state, losses, batches)
    if run.moe_metrics is not None:
        groups = run.world.pg_collection
        if updated:
            update_expert_biases(run.model, run.moe_metrics, groups.tp_dp_cp)
            update_quantile_betas(run.model, run.moe_metrics, groups.tp_dp_cp)
        run.moe_metrics.end_step(groups.tp_cp)
    if run.router_tracer is not None:
        run.router_tracer.advance_step(state.iteration + 1, cpu_batches)
    outcome = StepOutcome(
        loss,
        grad_norm,
        run.optimizer.param_groups[0]["lr"],
        updated,
        agreed,
        run.optimizer.grad_scaler.scale,
        is_search,
        mtp.means(run.world),
    )
    if not updated:
        _tell_skipped(run, state, outcome)
    return outcome


def next_batches(run: Run, data_iterator: Iterator[Batch], *, mtp_depths: int = 0) -> list[Batch]:
    """Return this rank's positions of the microbatches of one global batch, on the CPU.

    With what ``mtp_depths`` modules of multi-token prediction read of them.

    Raises:
        DataError: The iterator ended before. Told here, since other stages of a pipeline would
            wait for what cannot come.
    """
    cp = run.world.pg_collection.cp
    whole = list(islice(data_iterator, run.num_microbatches))
    if len(whole) < run.num_microbatches:
        raise DataError(
            f"{run.world.place()}: the data iterator ended after {len(whole)} of the "
            f"{run.num_microbatches} microbatches of a global batch"
        )
    whole = [with_ahead(batch, mtp_depths) for batch in whole]
    return [batch.of_positions(cp.rank(), cp.size()) for batch in whole]


class TokenCounts(NamedTuple):
    """Tokens of the global batch, [] fp64 on the device, at least 1.

    At least 1, so that a batch without any gives loss 0 and gradient 0, not 0/0.
    """

    loss: Tensor
    """Those that count in the loss."""
    valid: Tensor
    """Those that are no padding."""
    ahead: Tensor
    """[D] fp64: labels that count at each depth of multi-token prediction."""


def count_tokens(batches: Sequence[Batch], world: World) -> TokenCounts:
    """Count the tokens of the global batch in one collective, without waiting for the device."""
    counted = sum(int(batch.loss_mask.sum()) for batch in batches)
    padding = sum(int(b.padding_mask.sum()) for b in batches if b.padding_mask is not None)
    valid = sum(batch.tokens.numel() for batch in batches) - padding
    ahead = labels_ahead(batches, batches[0].num_depths)
    mine = torch.tensor([counted, valid, *ahead], dtype=torch.float64)
    counts = mine.to(world.device, non_blocking=True)
    dist.all_reduce(counts, group=world.pg_collection.dp_cp)
    counts.clamp_(min=1.0)
    return TokenCounts(counts[0], counts[1], counts[2:])


def run_microbatches(
    run: Run, state: TrainState, batches: Sequence[Batch], counts: TokenCounts, mtp: MTPLosses
) -> Tensor:
    """Add the microbatches of a step to the gradients; return their sums of losses.

    [microbatches] fp64, without gradient; zeros on a pipeline rank without the output layer.
    """
    forwards = run.num_microbatches * run.world.pg_collection.dp.size()  # of all their shares
    losses = torch.zeros(len(batches), dtype=torch.float64, device=run.world.device)
    loss_scale = run.optimizer.grad_scaler.scale
    divisor = counts.loss / loss_scale

    def forward(index: int, chunk: int, pipeline_input: Tensor | None) -> Tensor:
        batch = batches[index]
        context = ForwardContext(
            rng=SampleRng(state.dropout_seed, batch.sample_ids),
            microbatch=index,
            iteration=state.iteration,
            chunk=chunk,
            pipeline_input=pipeline_input,
            moe_metrics=run.moe_metrics,
            router_tracer=run.router_tracer if run.is_tracing else None,
            same_num_tokens=True,  # all are of --micro-batch-size x --seq-length
            aux_loss_scale=1.0 / forwards,
            loss_scale=loss_scale,
            padding_mask=batch.padding_mask,
            mean_valid_tokens=counts.valid / forwards,
            lanes=run.pipeline.lanes,
            ahead=mtp.of_microbatch(index, batch),
        )
        output, loss_func = run.forward_step(iter((batch,)), partial(run.model, context=context))
        if not run.pipeline.has_loss(chunk):
            return output
        loss_sum = checked_loss(loss_func(output)).loss_sum
        losses[index] = loss_sum.detach()
        return loss_sum / divisor

    run.pipeline.forward_backward(forward, no_sync=run.model.no_sync)
    return losses


def checked_loss(result: Any) -> MaskedLoss:
    """Return what a script's ``loss_func`` gave, if it is what a step needs.

    Raises:
        ConfigError: It is something else, such as the ``(loss, {...})`` of Megatron-LM's scripts.
    """
    if isinstance(result, MaskedLoss):
        return result
    raise ConfigError(
        f"loss_func returned a {type(result).__name__}; it must return megatron.training.loss."
        "MaskedLoss(loss_sum, num_tokens): the sum of the losses of unmasked tokens, not their "
        "mean, and the number of those tokens"
    )


def agree(
    losses: Tensor, num_tokens: Tensor, notes: Sequence[float], world: World
) -> tuple[float, tuple[float, ...]]:
    """Return the mean loss of the global batch and the summed notes, equal on all ranks.

    Args:
        losses: [microbatches] fp64, sums of this rank; zeros where another stage has the loss.
        num_tokens: [] fp64, of the global batch.
        notes: Numbers of this rank.
        world: The ranks; tensor-parallel ones have the same losses, which count once.
    """
    mine = torch.tensor(notes, dtype=torch.float64, device=losses.device)
    share = losses.sum() if world.pg_collection.tp.rank() == 0 else torch.zeros_like(losses[0])
    total = torch.cat([share.view(1), mine])
    dist.all_reduce(total, group=world.pg_collection.world)
    total[0] /= num_tokens
    loss, *agreed = total.tolist()
    return loss, tuple(agreed)


def _tell_skipped(run: Run, state: TrainState, outcome: StepOutcome) -> None:
    if outcome.is_search:
        log.info(
            "iteration %d: the gradient is too large for fp16 and this loss scale: the update is "
            "skipped, the next loss scale is %.1f",
            state.iteration + 1,
            outcome.loss_scale,
        )
        return
    log.warning(
        "iteration %d: lm loss %s, grad norm %s: not finite, the update is skipped (samples "
        "%d to %d)",
        state.iteration + 1,
        outcome.lm_loss,
        outcome.grad_norm,
        state.consumed_samples,
        state.consumed_samples + run.global_batch_size - 1,
    )


def _tell_parameters(bad: Sequence[str]) -> None:
    shown = ", ".join(bad[:PARAMETERS_TOLD]) + (", ..." if len(bad) > PARAMETERS_TOLD else "")
    log.info("the gradient is not finite in %d parameters: %s", len(bad), shown)


def _tell_samples(
    world: World, state: TrainState, losses: Tensor, batches: Sequence[Batch]
) -> None:
    for index, (loss, batch) in enumerate(zip(losses, batches, strict=True)):
        if not math.isfinite(loss.item()):
            log.warning(
                "%s, iteration %d, microbatch %d: loss %s of samples %s",
                world.place(),
                state.iteration + 1,
                index,
                loss.item(),
                list(batch.sample_ids),
            )
