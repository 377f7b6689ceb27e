"""Records which experts each token chose: in slots on the device, written once a step.

MoE layers *assign* into the slot [layer, microbatch], so a recomputed forward is recorded once.
Nothing waits for the device before the end of the step.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.core.transformer.moe.router_trace_files import (
    StepTrace,
    id_dtype,
    no_expert,
    rank_folder,
    write_step,
)

log = logging.getLogger(__name__)

_HEADERS_BYTES = 512
"""More than what a file adds to one array."""


class TracedBatch(Protocol):
    """What a trace keeps of a microbatch, on the CPU."""

    @property
    def tokens(self) -> Tensor:
        """[b, s] int64."""

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """[b]: numbers in the global order."""

    @property
    def padding_mask(self) -> Tensor | None:
        """[b, s] bool, True for padding; None for none."""


@dataclass(frozen=True, kw_only=True)
class TraceLimits:
    """How much of a run is traced; the same on every rank, so that all end at the same step."""

    max_steps: int | None = None
    """Steps still to be traced; None for all."""
    max_bytes: int | None = None
    """Bytes that a rank may still write; None for no bound."""


class _Choice(NamedTuple):
    experts: Tensor
    """[s*b, topk], uint8, or int16 with the bits of uint16."""
    weights: Tensor
    """[s*b, topk], float16."""


class RouterTracer:
    """Writes the choices of this rank's tokens; ends by itself when its limits are reached."""

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        *,
        moe_layers: Sequence[int],
        num_experts: Sequence[int],
        topk: Sequence[int],
        limits: TraceLimits,
    ) -> None:
        """Make the folder of this rank.

        Args:
            output_dir: Folder of this start of the run (``router_trace_files.next_start``).
            rank: Of this process.
            moe_layers: Global indices of the MoE layers of this rank.
            num_experts: Of each of them.
            topk: Of each of them: the choices that are kept, by falling weight.
            limits: When to end.

        Raises:
            OSError: The folder cannot be made.
        """
        self.folder = rank_folder(output_dir, rank)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._topk = dict(zip(moe_layers, topk, strict=True))
        self._dtype = {
            layer: id_dtype(count) for layer, count in zip(moe_layers, num_experts, strict=True)
        }
        self._limits = limits
        self._steps = self._bytes = 0
        self._slots: dict[tuple[int, int], _Choice] = {}
        self.is_on = limits.max_steps is None or limits.max_steps > 0
        """False when nothing more is recorded."""

    def record_indices(
        self, layer: int, microbatch: int, probs: Tensor, routing_map: Tensor
    ) -> None:
        """Assign what one layer chose in one microbatch; a second time changes nothing.

        Args:
            layer: Global index of the layer.
            microbatch: Slot within the step.
            probs: [num_tokens, num_experts], after a capacity; 0 where it dropped a token.
            routing_map: The same shape, bool, before a capacity.
        """
        topk = min(self._topk[layer], routing_map.shape[1])
        ranked = probs.detach().masked_fill(~routing_map, -1.0)
        weights, experts = ranked.sort(dim=1, descending=True, stable=True)
        weights, experts = weights[:, :topk], experts[:, :topk]
        is_none = weights < 0
        none = no_expert(self._dtype[layer])
        narrow = experts.masked_fill(is_none, none if none == 255 else -1)
        self._slots[layer, microbatch] = _Choice(
            narrow.to(torch.uint8 if none == 255 else torch.int16),
            weights.masked_fill(is_none, 0.0).to(torch.float16),
        )

    def advance_step(self, step_id: int, batches: Sequence[TracedBatch]) -> None:
        """Write the slots as step ``step_id`` and empty them; waits for the device.

        A full disk ends the trace with a warning, not the run.

        Args:
            step_id: Number of the step, from 1.
            batches: The microbatches of the step, in their order.
        """
        if not self.is_on or not self._slots:
            return
        trace = self._gathered(batches)
        self._slots.clear()
        size = sum(array.nbytes + _HEADERS_BYTES for array in _arrays(trace))
        most = self._limits.max_bytes
        if most is not None and self._bytes + size > most:
            self._end(f"--moe-routing-trace-max-mb is reached before step {step_id}")
            return
        try:
            self._bytes += write_step(self.folder, step_id, trace)
        except OSError as error:
            self.is_on = False
            log.warning("the routing trace ends: %s cannot be written (%s)", self.folder, error)
            return
        self._steps += 1
        if self._steps == self._limits.max_steps:
            self._end(f"--moe-routing-trace-max-training-iters is reached with step {step_id}")

    def _end(self, why: str) -> None:
        self.is_on = False
        log.info("the routing trace ends: %s (%d bytes of this rank)", why, self._bytes)

    def _gathered(self, batches: Sequence[TracedBatch]) -> StepTrace:
        tokens = np.concatenate([batch.tokens.numpy() for batch in batches])
        masks = [
            np.zeros(batch.tokens.shape, dtype=np.bool_)
            if batch.padding_mask is None
            else batch.padding_mask.numpy()
            for batch in batches
        ]
        ids = [number for batch in batches for number in batch.sample_ids]
        experts: dict[int, NDArray[Any]] = {}
        weights: dict[int, NDArray[np.float16]] = {}
        for layer, dtype in self._dtype.items():
            choices = [self._slots[layer, index] for index in range(len(batches))]
            experts[layer] = _by_sample([c.experts for c in choices], batches).view(dtype)
            weights[layer] = _by_sample([c.weights for c in choices], batches)
        return StepTrace(
            sample_ids=np.array(ids, dtype=np.int64),
            tokens=tokens.astype(np.uint16 if tokens.max(initial=0) < 1 << 16 else np.int32),
            padding=np.concatenate(masks),
            experts=experts,
            weights=weights,
        )


def _by_sample(slots: Sequence[Tensor], batches: Sequence[TracedBatch]) -> NDArray[Any]:
    """Return [samples, s, topk] of slots [s*b, topk], in one copy from the device."""
    rows = [
        slot.view(batch.tokens.shape[1], batch.tokens.shape[0], -1).transpose(0, 1)
        for slot, batch in zip(slots, batches, strict=True)
    ]
    return torch.cat(rows).cpu().numpy()


def _arrays(trace: StepTrace) -> list[NDArray[Any]]:
    found = [trace.sample_ids, trace.tokens, *trace.experts.values(), *trace.weights.values()]
    return [*found, trace.padding] if trace.padding.any() else found
