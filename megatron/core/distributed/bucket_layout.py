"""Where each parameter lies: flat buffers, buckets that are reduced at once, and their order.

Pure arithmetic on sizes, equal on every rank: parameters are numbers in registration order, not
names, since a rank's experts are named by their global ids. Easy to break: buckets are reduced in
``BucketLayout.buckets`` order on every rank, dense and expert ones in one list, or ranks hang.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PARAM_ALIGNMENT = 64
"""Elements: a parameter starts at a multiple, so that kernels may load whole vectors from it."""

BUFFER_ALIGNMENT = 1024
"""Elements: a bucket begins at a multiple, and so does the slice of a rank that owns a part of it:
each is whole rows of the sum of squares (see clip_grads.py), the same rows whoever adds them."""


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """What the layout must know of one parameter."""

    numel: int
    is_expert: bool = False
    decays: bool = True
    dtype: str = "torch.float32"
    split_over: str | None = None
    """Group whose ranks hold slices of the parameter; see ``ParamRole.split_over``."""
    sums_over_tp: bool = False
    """See ``ParamRole.sums_over_tp``."""
    tied_ends: str = "no"
    """See ``ParamRole.tied_ends``."""


class BufferKey(NamedTuple):
    """Parameters that agree in this share a buffer."""

    is_expert: bool
    decays: bool
    dtype: str
    split_over: str | None = None
    sums_over_tp: bool = False
    tied_ends: str = "no"


class Span(NamedTuple):
    """Elements [start, end) of a buffer that hold parameter number ``param``."""

    param: int
    start: int
    end: int


class Bucket(NamedTuple):
    """Elements [start, end) of buffer number ``buffer``, reduced by one collective."""

    buffer: int
    start: int
    end: int
    params: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BufferLayout:
    """One flat buffer; what lies between its spans is padding and stays zero."""

    key: BufferKey
    numel: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """All buffers, and all buckets in the one order in which every rank reduces them."""

    buffers: tuple[BufferLayout, ...]
    buckets: tuple[Bucket, ...]

    def fingerprint(self) -> str:
        """Return a hash that is equal on two ranks exactly when their layouts are."""
        return hashlib.sha256(repr((self.buffers, self.buckets)).encode()).hexdigest()


def default_bucket_size(data_parallel_size: int) -> int:
    """Return the parameters of a bucket when the user names no number.

    Large enough that the start of a collective costs little against its transfer, whatever the
    number of ranks.
    """
    return max(40_000_000, 1_000_000 * data_parallel_size)


def plan_buckets(
    specs: Sequence[ParamSpec], bucket_size: int, shards: Callable[[BufferKey], int] | None = None
) -> BucketLayout:
    """Lay parameters out in reverse registration order, the order in which backward fills them.

    Args:
        specs: The parameters in registration order, which is that of their use in forward.
        bucket_size: A bucket is closed when it holds at least so many elements.
        shards: Number of ranks that each own an equal slice of every bucket of a buffer; buckets
            are padded to fit. Not sharded when None.

    Returns:
        Buffers by their ``BufferKey`` in order of first use, and the buckets of all of them
        ordered by when backward is expected to have filled them; what two stages share is last.
    """
    assert bucket_size > 0, f"a bucket holds at least one element: {bucket_size=}"
    members: dict[BufferKey, list[int]] = {}
    for param in reversed(range(len(specs))):
        spec = specs[param]
        key = BufferKey(
            spec.is_expert,
            spec.decays,
            spec.dtype,
            spec.split_over,
            spec.sums_over_tp,
            spec.tied_ends,
        )
        members.setdefault(key, []).append(param)
    buffers, buckets = [], []
    for number, (key, params) in enumerate(members.items()):
        unit = BUFFER_ALIGNMENT * (1 if shards is None else shards(key))
        spans, own = _lay_out(number, [(p, specs[p].numel) for p in params], bucket_size, unit)
        buffers.append(BufferLayout(key=key, numel=own[-1].end, spans=tuple(spans)))
        buckets.extend(own)
    # the last parameter that backward reaches completes a bucket
    buckets.sort(
        key=lambda bucket: (buffers[bucket.buffer].key.tied_ends != "no", -min(bucket.params))
    )
    return BucketLayout(buffers=tuple(buffers), buckets=tuple(buckets))


def shard_of(start: int, end: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the elements [start, end) that ``rank`` of ``ranks`` owns of a bucket [start, end)."""
    assert (end - start) % (ranks * BUFFER_ALIGNMENT) == 0, f"{start=} {end=} is no {ranks} slices"
    size = (end - start) // ranks
    return start + rank * size, start + (rank + 1) * size


def _lay_out(
    number: int, members: Sequence[tuple[int, int]], bucket_size: int, unit: int
) -> tuple[list[Span], list[Bucket]]:
    """Place (parameter, elements) one after another; buckets are multiples of ``unit``."""
    spans: list[Span] = []
    buckets: list[Bucket] = []
    begin, end, params = 0, 0, []
    for place, (param, numel) in enumerate(members):
        start = round_up(end, PARAM_ALIGNMENT)
        end = start + numel
        spans.append(Span(param, start, end))
        params.append(param)
        if end - begin >= bucket_size or place == len(members) - 1:
            # padding belongs to the bucket before it, so that buckets tile the buffer
            end = begin + round_up(end - begin, unit)
            buckets.append(Bucket(number, begin, end, tuple(params)))
            begin, params = end, []
    return spans, buckets


def round_up(value: int, multiple: int) -> int:
    """Return the next multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
