"""Walks a rank's list of a pipeline schedule: receives, computes, sends, frees.

The list has steps and transfers in one order that all ranks share (schedule_transfers.py), so that
nothing here can wait for ever. Messages are started where the list has them and waited for where
they are needed. Easy to break: two ranks must start their common messages in the same order. Gloo
and NCCL pair messages of two ranks by order alone, and NCCL runs both directions of a pair (or all
messages of a group, where it makes its communicators eagerly) one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import ProcessGroup, Work

from megatron.core.lanes import Lanes
from megatron.core.pipeline_parallel.schedule_pairs import Pair
from megatron.core.pipeline_parallel.schedule_step import Product, Schedule, Step, forward_only
from megatron.core.pipeline_parallel.schedule_transfers import (
    PairedAction,
    Transfer,
    with_paired_transfers,
    with_transfers,
)
from megatron.core.weight_grad_queue import WeightGradQueue

ForwardChunk = Callable[[int, int, Tensor | None], Tensor]
"""``forward(microbatch, chunk, pipeline_input) -> output``: hidden states of ``Message``'s shape,
or at the last stage what backward begins from, []. ``pipeline_input`` is None at the first stage.
"""


_MOST_UNDER_WAY = 16
"""Sent messages that are kept. Gloo does not say when one is out unless it is waited for; any older
than this has long been taken, since receives are started before they are needed."""


class Message(NamedTuple):
    """What goes from stage to stage, and back as its gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class PipelineExecutor:
    """The schedule of one pipeline rank, ready to be walked, once for each optimizer step."""

    def __init__(
        self,
        schedule: Schedule,
        group: ProcessGroup,
        message: Message,
        *,
        lanes: Lanes | None = None,
        weights_while_waiting: bool = False,
    ) -> None:
        """Derive the lists of this rank.

        Args:
            schedule: Of all ranks of ``group``.
            group: The pipeline ranks.
            message: The same for all microbatches and stages.
            lanes: Where forwards and backwards run by turns; ``can_pair(schedule)`` then. None for
                one step after the other.
            weights_while_waiting: Make weight gradients where a backward waits for the network.
        """
        assert group.size() == schedule.pp, f"{group.size()=} for a schedule of {schedule.pp=}"
        self.schedule, self.group, self.message = schedule, group, message
        self.lanes = lanes
        """For the ``ForwardContext`` of what ``forward_backward`` calls."""
        self.weights_while_waiting = weights_while_waiting
        plan = with_transfers if lanes is None else with_paired_transfers
        self._actions: Sequence[PairedAction] = plan(schedule)[group.rank()]
        self._forwards = with_transfers(forward_only(schedule))[group.rank()]
        self.last_backwards = _last_backwards(schedule.steps[group.rank()])

    def has_loss(self, chunk: int) -> bool:
        """Say whether ``chunk`` of this rank is the last stage."""
        return self.schedule.stage(self.group.rank(), chunk) == self.schedule.num_stages - 1

    def forward_backward(
        self,
        forward: ForwardChunk,
        *,
        no_sync: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Go through all microbatches, forward and backward. All pipeline ranks call this.

        Args:
            forward: Called once for each microbatch and chunk.
            no_sync: Context of every backward but the last one of each chunk.
        """
        _Walk(self, forward, self.last_backwards, no_sync).go(self._actions)

    @torch.no_grad()
    def forward_only(self, forward: ForwardChunk) -> None:
        """Go through all microbatches without gradients. All pipeline ranks call this."""
        _Walk(self, forward, frozenset(), nullcontext).go(self._forwards)


class _Kept(NamedTuple):
    """What a forward leaves for its backward."""

    entry: Tensor | None
    """The leaf that the stage's input was; None at the first stage."""
    end: GradientEdge
    """Where backward begins. Not the output itself: its memory is free when it has been sent."""


class _Sent(NamedTuple):
    work: Work
    product: Product
    tensor: Tensor
    """Must not be freed before the message is out."""


class _Walk:
    """One passage through a list: what is received, made, kept and under way."""

    def __init__(
        self,
        executor: PipelineExecutor,
        forward: ForwardChunk,
        last_backwards: frozenset[Step],
        no_sync: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.schedule, self.group = executor.schedule, executor.group
        self.rank, self.message = executor.group.rank(), executor.message
        self.lanes, self.weights_while_waiting = executor.lanes, executor.weights_while_waiting
        self.forward, self.last_backwards, self.no_sync = forward, last_backwards, no_sync
        self.started: dict[Product, Work] = {}
        self.there: dict[Product, Tensor] = {}
        """Received, or under way to here, or made and not yet sent or used."""
        self.kept: dict[tuple[int, int], _Kept] = {}
        self.put_off: dict[tuple[int, int], WeightGradQueue] = {}
        """By microbatch and chunk, between ``I`` and ``W``."""
        self.sent: list[_Sent] = []

    def go(self, actions: Sequence[PairedAction]) -> None:
        for action in actions:
            if isinstance(action, Step):
                self._compute(action)
            elif isinstance(action, Pair):
                assert self.lanes is not None, f"{action} needs lanes"
                self.lanes.run_pair(*(partial(self._compute, step) for step in action))
            elif action.direction == "send":
                self._send(action)
            else:
                self._receive(action)
        self._free_sent(lambda _: True, keep=0)
        left = [*self.there, *self.kept, *self.put_off]
        assert not left, f"made or received and not used: {left}"

    def _receive(self, transfer: Transfer) -> None:
        shape, dtype, device = self.message
        buffer = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(buffer, group=self.group, group_src=transfer.peer)
        assert work is not None, "this rank is in the pipeline group"
        self.started[transfer.product], self.there[transfer.product] = work, buffer

    def _send(self, transfer: Transfer) -> None:
        tensor = self.there.pop(transfer.product)
        assert (tuple(tensor.shape), tensor.dtype) == self.message[:2], (
            f"{transfer.product} is {tuple(tensor.shape)} {tensor.dtype}, not {self.message}"
        )
        work = dist.isend(tensor, group=self.group, group_dst=transfer.peer)
        assert work is not None, "this rank is in the pipeline group"
        self.sent.append(_Sent(work, transfer.product, tensor))
        self._free_sent(lambda sent: sent.work.is_completed(), keep=_MOST_UNDER_WAY)

    def _free_sent(self, is_out: Callable[[_Sent], bool], *, keep: int) -> None:
        """Free the messages that are out, and wait for the oldest so that ``keep`` are left."""
        left = []
        for age, sent in zip(range(len(self.sent), 0, -1), self.sent, strict=True):
            if age > keep or is_out(sent):
                sent.work.wait()
            else:
                left.append(sent)
        self.sent = left

    def _take(self, product: Product) -> Tensor:
        if product in self.started:
            self.started.pop(product).wait()
        return self.there.pop(product)

    def _compute(self, step: Step) -> None:
        if step.kind == "F":
            self._run_forward(step)
        elif step.kind == "W":
            self.put_off.pop((step.microbatch, step.chunk)).run()
        else:
            with nullcontext() if step in self.last_backwards else self.no_sync():
                self._run_backward(step)

    def _run_forward(self, step: Step) -> None:
        stage = self.schedule.stage(self.rank, step.chunk)
        entry = None
        if stage:
            entry = self._take(Product("activation", step.microbatch, stage - 1))
            entry.requires_grad_(torch.is_grad_enabled())
        output = self.forward(step.microbatch, step.chunk, entry)
        if torch.is_grad_enabled():
            self.kept[step.microbatch, step.chunk] = _Kept(entry, get_gradient_edge(output))
        if stage < self.schedule.num_stages - 1:
            self.there[self.schedule.makes(self.rank, step)] = output.detach().contiguous()

    def _run_backward(self, step: Step) -> None:
        stage = self.schedule.stage(self.rank, step.chunk)
        kept = self.kept.pop((step.microbatch, step.chunk))
        gradient = None
        if stage < self.schedule.num_stages - 1:
            gradient = self._take(Product("gradient", step.microbatch, stage + 1))
            # that gradient was made of it: the stage after has it
            sent_forward = Product("activation", step.microbatch, stage)
            self._free_sent(lambda sent: sent.product == sent_forward, keep=_MOST_UNDER_WAY)
        with self._weights(step):
            torch.autograd.backward(kept.end, gradient)
        if kept.entry is not None:
            assert kept.entry.grad is not None, f"{step}: the output does not depend on the input"
            self.there[self.schedule.makes(self.rank, step)] = kept.entry.grad

    @contextmanager
    def _weights(self, step: Step) -> Iterator[None]:
        """Leave the gradients of weights to the ``W`` of the microbatch, or to where it waits."""
        if step.kind == "I":
            queue = self.put_off[step.microbatch, step.chunk] = WeightGradQueue()
            with queue.collecting():
                yield
        elif self.weights_while_waiting:
            queue = WeightGradQueue(while_waiting=True)
            with queue.collecting():
                yield
            queue.run()
        else:
            yield


def _last_backwards(steps: Sequence[Step]) -> frozenset[Step]:
    """Return the last backward of each chunk; gradients put off in it are known to be under way."""
    last = {step.chunk: step for step in steps if step.kind in ("B", "I")}
    return frozenset(last.values())
