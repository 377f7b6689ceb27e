"""The first tensor that differs, in the order in which a step makes them.

Of each step: the outputs of layers, microbatch by microbatch; the losses; gradients of those
outputs as backward goes; gradients of parameters, last layers first; norm; weights. Every rank's
pieces are held against the one process, so that replicas that differ are told like anything else.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.param_role import LogicalShard
from tools.layouts.compare import COUNTS, Difference, Tolerance, measure, of_numbers
from tools.layouts.oracle import LayoutResult, RankRecord
from tools.layouts.trace import Piece, put_together
from tools.layouts.whole_tensors import Blocks


class First(NamedTuple):
    """Where two runs part."""

    difference: Difference
    samples: tuple[int, ...]
    """Of the microbatch; empty where it is of a whole step."""
    ranks: tuple[int, ...]
    """Ranks on which it is wrong."""
    others: tuple[str, ...]
    """What else is wrong of the same kind in the same step, by global names."""


def first_difference(
    ranks: Sequence[RankRecord],
    ones: Sequence[RankRecord],
    want: LayoutResult,
    tolerance: Tolerance,
) -> First | None:
    """Find it; None when no watched tensor differs.

    Args:
        ranks: What each rank kept, traced.
        ones: What each rank of the run to be equal to kept, traced; that is one process.
        want: The same, in global names.
        tolerance: What rounding may do.
    """
    outputs = _activations(ranks, ones)
    for what in ("initial weight",):
        found = _of_blocks(0, what, [rank.initial for rank in ranks], want.initial)
        if (first := _first(found, tolerance)) is not None:
            return first
    for step, record in enumerate(want.steps):
        gradients = dict(reversed(record.gradients.items()))
        orders = (
            _of_kind(outputs, step, "output"),
            _of_ranks(step, "lm loss", [rank.losses[step] for rank in ranks], record.lm_loss),
            _of_kind(outputs, step, "gradient of"),
            _of_blocks(step, "gradient", [rank.gradients[step] for rank in ranks], gradients),
            _of_ranks(step, "grad norm", [rank.norms[step] for rank in ranks], record.grad_norm),
            _of_blocks(step, "weight", [rank.weights[step] for rank in ranks], record.weights),
        )
        for found in orders:
            if (first := _first(found, tolerance)) is not None:
                return first
    return _first(_of_reports(ranks, want), tolerance)


def _first(found: Iterator[First], tolerance: Tolerance) -> First | None:
    """Return the first that is wrong, with the names of all others of the same kind."""
    wrong = [one for one in found if one.difference.is_beyond(tolerance)]
    if not wrong:
        return None
    names = dict.fromkeys(one.difference.name for one in wrong)
    return wrong[0]._replace(others=tuple(names))


_Activations = dict[tuple[int, str, str, tuple[int, ...]], First]


def _activations(ranks: Sequence[RankRecord], ones: Sequence[RankRecord]) -> _Activations:
    """Compare what flowed through the model, in the order of one process."""
    whole = {key: piece.tensor for key, piece in put_together([one.pieces for one in ones]).items()}
    found: _Activations = {}
    for number, rank in enumerate(ranks):
        for piece in rank.pieces:
            if piece.key not in whole:
                continue
            got = First(_of_piece(piece, whole[piece.key]), piece.samples, (number,), ())
            before = found.get(piece.key)
            if before is None or got.difference.error > before.difference.error:
                found[piece.key] = got
    return {key: found[key] for key in whole if key in found}


def _of_piece(piece: Piece, whole: Tensor) -> Difference:
    want = whole[list(piece.positions)]
    scale = whole.abs().max().item()
    return measure(piece.step, piece.kind, piece.name, piece.tensor, want, scale=scale)


def _of_kind(found: _Activations, step: int, kind: str) -> Iterator[First]:
    return (one for key, one in found.items() if key[:2] == (step, kind))


def _of_ranks(
    step: int, what: str, got: Sequence[float | None], want: float | None
) -> Iterator[First]:
    for rank, value in enumerate(got):
        yield First(of_numbers(step, what, "", value, want), (), (rank,), ())


def _of_blocks(
    step: int, what: str, ranks: Sequence[Blocks], want: Mapping[str, Tensor]
) -> Iterator[First]:
    """Compare the blocks of every rank with their place in the whole; yield the worst of each."""
    scale = max((tensor.abs().max().item() for tensor in want.values()), default=0.0)
    by_name: dict[str, list[tuple[int, LogicalShard]]] = {}
    for rank, blocks in enumerate(ranks):
        for block in blocks:
            by_name.setdefault(block.name, []).append((rank, block))
    for name, tensor in want.items():
        if name not in by_name:
            missing = Difference(step, f"missing {what}", name, float("inf"), float("nan"), 0.0)
            yield First(missing, (), (), ())
            continue
        yield max(
            (
                First(
                    measure(step, what, name, *_both(block, tensor), scale=scale), (), (rank,), ()
                )
                for rank, block in by_name[name]
            ),
            key=lambda one: one.difference.error,
        )


def _both(block: LogicalShard, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block and what belongs in its place."""
    if tuple(block.shape) != tuple(whole.shape):
        return block.tensor, torch.empty(0)
    return block.tensor, whole[block.region]


def _of_reports(ranks: Sequence[RankRecord], want: LayoutResult) -> Iterator[First]:
    last = len(want.steps) - 1
    for number, rank in enumerate(ranks):
        counts = measure(last, COUNTS, "", rank.counts, want.tokens_per_expert)
        yield First(counts, (), (number,), ())
        for name, value in want.metrics.items():
            got = rank.metrics.get(name, float("inf"))
            yield First(of_numbers(last, "metric", name, got, value), (), (number,), ())
