"""Which elements of the flat buffers a rank steps, and to which parameters they belong. Pure.

Plain: every rank steps whole buffers. ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054, P_os):
of each bucket a rank steps the slice that it gets the summed gradients of.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron.core.distributed.bucket_layout import Bucket, BufferLayout, Span, shard_of


class Piece(NamedTuple):
    """Elements [start, end) of buffer number ``buffer``, stepped as one tensor."""

    buffer: int
    start: int
    end: int


class Overlap(NamedTuple):
    """What a piece holds of a parameter."""

    span: Span
    """The parameter in its buffer."""
    start: int
    """First element of the buffer that is in both."""
    end: int
    """First element behind."""


def whole_buffers(buffers: Sequence[BufferLayout]) -> list[Piece]:
    """Return one piece for each buffer."""
    return [Piece(number, 0, buffer.numel) for number, buffer in enumerate(buffers)]


def owned_slices(
    buckets: Sequence[Bucket], ranks: Sequence[int], sizes: Sequence[int]
) -> list[Piece]:
    """Return the slice of every bucket that this rank owns, in order of buffers and places.

    Args:
        buckets: All buckets.
        ranks: This rank in the group of each buffer.
        sizes: Size of the group of each buffer.
    """
    return sorted(
        Piece(b.buffer, *shard_of(b.start, b.end, ranks[b.buffer], sizes[b.buffer]))
        for b in buckets
    )


def overlaps(piece: Piece, buffer: BufferLayout) -> Iterator[Overlap]:
    """Yield what ``piece`` holds of the parameters of its buffer; padding is nobody's."""
    for span in buffer.spans:
        start, end = max(span.start, piece.start), min(span.end, piece.end)
        if start < end:
            yield Overlap(span, start, end)
