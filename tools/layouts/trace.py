"""What flows through a model, by name and sample: kept by hooks, put together over ranks.

A rank sees some samples, some positions and some layers. Its pieces carry their places, so that
those of all ranks add up to what one process sees, and replicas can be told apart.
"""

import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.sequence_slices import own_ranges
from megatron.core.transformer.forward_context import ForwardContext
from megatron.training.run import Run

LOSS = "loss of each token"
_SHOWN = (
    r"embedding|decoder\.final_layernorm|"
    r"decoder\.layers\.\d+(\.self_attention|\.pre_mlp_layernorm|\.mlp)?"
)


class Piece(NamedTuple):
    """Some positions of one tensor of one microbatch."""

    step: int
    kind: str
    """``output`` or ``gradient of``: of a forward or of the backward."""
    name: str
    samples: tuple[int, ...]
    positions: tuple[int, ...]
    tensor: Tensor
    """[positions, samples, ...]."""

    @property
    def key(self) -> tuple[int, str, str, tuple[int, ...]]:
        """What it is a piece of."""
        return self.step, self.kind, self.name, self.samples


class Tracer:
    """Keeps every watched output of the first time it is made, and its gradient."""

    def __init__(self, run: Run) -> None:
        """Put hooks into the model of ``run``; their number is small, their cost is not."""
        self.step = 0
        self.pieces: dict[tuple[Any, ...], Piece] = {}
        self._groups = run.world.pg_collection
        self._length = run.seq_length
        self._now = threading.local()  # two microbatches may be under way, each in its thread
        for name, module in watched(run.model.module):
            module.register_forward_pre_hook(self._note_context, with_kwargs=True)
            module.register_forward_hook(self._keeper(name))

    def _note_context(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Remember whose microbatch it is, for modules within that are not told."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, ForwardContext):
                self._now.context = value

    def _keeper(self, name: str) -> Any:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            rng = self._now.context.rng
            tensor = output[0] if isinstance(output, tuple) else output
            if rng is None or tensor.dim() != (2 if name == LOSS else 3):
                return  # evaluation; or a stage without the head; or the copy of a tied weight
            samples = rng.sample_ids
            self._keep("output", name, samples, tensor.detach())
            if tensor.requires_grad:
                tensor.register_hook(
                    lambda grad: self._keep("gradient of", name, samples, grad.detach())
                )

        return keep

    def _keep(self, kind: str, name: str, samples: tuple[int, ...], tensor: Tensor) -> None:
        tensor = tensor.t() if name == LOSS else tensor  # [s, b, ...]
        positions = own_positions(self._length, tensor.shape[0], self._groups)
        piece = Piece(self.step, kind, name, samples, positions, tensor.clone())
        self.pieces.setdefault(piece.key, piece)  # a recomputed one is the same again


def watched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of what is worth comparing, by global names."""
    for name, module in model.named_modules():
        if name == "":
            yield LOSS, module
        elif re.fullmatch(_SHOWN, name):
            yield name, module


def own_positions(length: int, rows: int, groups: ProcessGroupCollection) -> tuple[int, ...]:
    """Return the positions of ``rows`` rows of this rank, of a sequence of ``length``.

    A context-parallel rank has its chunks; of these a tensor-parallel rank has all, or a share.
    """
    ranges = own_ranges(length, groups.cp.rank(), groups.cp.size())
    own = [position for part in ranges for position in part]
    if rows < len(own):
        start = groups.tp.rank() * rows
        own = own[start : start + rows]
    assert rows == len(own), f"{rows=} of {length=} on {groups.tp.size()} x {groups.cp.size()}"
    return tuple(own)


class Disagreement(NamedTuple):
    """Two ranks hold the same positions and not the same values."""

    piece: Piece
    error: float
    """Largest difference / largest value."""


class Whole(NamedTuple):
    """A tensor of one microbatch, put together."""

    tensor: Tensor
    disagreement: Disagreement | None
    """The worst one, of ranks that hold the same positions."""


def put_together(ranks: list[list[Piece]]) -> dict[tuple[Any, ...], Whole]:
    """Return the tensors of all ranks by key, in the order in which the first rank made them."""
    found: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in (piece for pieces in ranks for piece in pieces):
        found.setdefault(piece.key, []).append(piece)
    return {key: _whole(pieces) for key, pieces in found.items()}


def _whole(pieces: list[Piece]) -> Whole:
    length = 1 + max(max(piece.positions) for piece in pieces)
    whole = torch.full((length, *pieces[0].tensor.shape[1:]), torch.nan, dtype=torch.float64)
    worst: Disagreement | None = None
    for piece in pieces:
        mine, rows = piece.tensor.double(), list(piece.positions)
        there = whole[rows]
        error = (there - mine).abs().nan_to_num(0.0).max().item()
        scale = mine.abs().max().item() or 1.0
        if error and (worst is None or error / scale > worst.error):
            worst = Disagreement(piece, error / scale)
        whole[rows] = torch.where(there.isnan(), mine, there)
    return Whole(whole, worst)
