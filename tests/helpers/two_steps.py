"""Backward of several microbatches in one step each, or as input step and weight step."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.weight_grad_queue import WeightGradQueue

ORDERS = {
    "whole": ["B0", "B1", "B2"],
    "at_once": ["I0", "W0", "I1", "W1", "I2", "W2"],
    "late": ["I0", "I1", "W0", "I2", "W1", "W2"],
    "last_before_others": ["I0", "I1", "I2", "W0", "W1", "W2"],
    "some": ["B0", "I1", "B2", "W1"],
}
"""Name -> steps; the backward of microbatch 2 is the last one."""


def gradients(
    model: DistributedDataParallel, batches: Sequence[tuple[Tensor, ...]], order: Sequence[str]
) -> dict[str, Tensor]:
    """Do the steps of ``order`` on microbatches (ids, positions, labels); return the sums."""
    model.zero_grad_buffer()
    queues = {}
    for kind, number in ((step[0], int(step[1:])) for step in order):
        if kind == "W":
            queues.pop(number).run()
            continue
        queue = queues.setdefault(number, WeightGradQueue()) if kind == "I" else None
        with nullcontext() if number == len(batches) - 1 else model.no_sync():
            loss = loss_of(model, batches[number], number)
            with queue.collecting() if queue is not None else nullcontext():
                loss.backward()
    model.finish_grad_sync()
    assert all(param.grad is None for _, param in model.trainable_parameters())
    return {name: param.main_grad.clone() for name, param in model.trainable_parameters()}


def loss_of(model: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Return the loss of one microbatch, with dropout."""
    ids, positions, labels = batch
    samples = tuple(range(number * len(ids), (number + 1) * len(ids)))
    context = ForwardContext(rng=SampleRng(5, samples), microbatch=number)
    weights = torch.linspace(0.5, 1.5, labels.numel(), dtype=torch.float64, device=labels.device)
    losses: Tensor = model(ids, positions, labels=labels, context=context)
    return (losses * weights.view(labels.shape)).sum() / labels.numel()
