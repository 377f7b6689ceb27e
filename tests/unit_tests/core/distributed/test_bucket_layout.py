import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.distributed.bucket_layout import (
    BUFFER_ALIGNMENT,
    PARAM_ALIGNMENT,
    ParamSpec,
    default_bucket_size,
    plan_buckets,
    shard_of,
)

SPECS = st.lists(
    st.builds(
        ParamSpec,
        numel=st.integers(1, 5000),
        is_expert=st.booleans(),
        decays=st.booleans(),
        dtype=st.sampled_from(["torch.float32", "torch.bfloat16"]),
        split_over=st.sampled_from([None, "tp"]),
        tied_ends=st.sampled_from(["no", "no", "apart"]),
    ),
    min_size=1,
    max_size=20,
)
BUCKET_SIZES = st.integers(1, 20000)


@given(SPECS, BUCKET_SIZES)
def test_every_parameter_has_one_aligned_span_in_the_buffer_of_its_kind(specs, bucket_size):
    layout = plan_buckets(specs, bucket_size)
    seen = []
    for number, buffer in enumerate(layout.buffers):
        starts = {bucket.start for bucket in layout.buckets if bucket.buffer == number}
        assert buffer.numel % BUFFER_ALIGNMENT == 0
        end = 0
        for span in buffer.spans:
            spec = specs[span.param]
            kind = (spec.is_expert, spec.decays, spec.dtype, spec.split_over, False, spec.tied_ends)
            assert kind == buffer.key
            assert span.end - span.start == spec.numel
            assert span.start % PARAM_ALIGNMENT == 0
            gap = BUFFER_ALIGNMENT if span.start in starts else PARAM_ALIGNMENT
            assert 0 <= span.start - end < gap
            end = span.end
            seen.append(span.param)
        assert 0 <= buffer.numel - end < BUFFER_ALIGNMENT
    assert sorted(seen) == list(range(len(specs)))


@given(SPECS, BUCKET_SIZES)
def test_buckets_tile_their_buffer_and_hold_whole_parameters(specs, bucket_size):
    layout = plan_buckets(specs, bucket_size)
    for number, buffer in enumerate(layout.buffers):
        buckets = sorted(b for b in layout.buckets if b.buffer == number)
        assert [b.start for b in buckets] == [0] + [b.end for b in buckets[:-1]]
        assert buckets[-1].end == buffer.numel
        spans = {span.param: span for span in buffer.spans}
        for bucket in buckets:
            assert bucket.params
            for param in bucket.params:
                assert bucket.start <= spans[param].start
                assert spans[param].end <= bucket.end
        assert sorted(p for b in buckets for p in b.params) == sorted(spans)


@given(SPECS, BUCKET_SIZES)
def test_only_the_last_bucket_of_a_buffer_may_be_smaller_than_asked(specs, bucket_size):
    layout = plan_buckets(specs, bucket_size)
    for number, buffer in enumerate(layout.buffers):
        for bucket in layout.buckets:
            if bucket.buffer == number and bucket.end < buffer.numel:
                assert bucket.end - bucket.start >= bucket_size


@given(SPECS, BUCKET_SIZES)
def test_buckets_are_ordered_by_when_a_backward_in_reverse_order_fills_them(specs, bucket_size):
    layout = plan_buckets(specs, bucket_size)
    tied = [layout.buffers[bucket.buffer].key.tied_ends != "no" for bucket in layout.buckets]
    filled_at = [
        max(len(specs) - 1 - param for param in bucket.params) for bucket in layout.buckets
    ]
    keys = list(zip(tied, filled_at, strict=True))
    assert keys == sorted(keys)  # what two pipeline stages share comes last


@given(SPECS, BUCKET_SIZES)
def test_ranks_with_the_same_parameters_get_the_same_layout(specs, bucket_size):
    first, second = plan_buckets(specs, bucket_size), plan_buckets(list(specs), bucket_size)
    assert first == second
    assert first.fingerprint() == second.fingerprint()
    other = plan_buckets([*specs, ParamSpec(numel=1)], bucket_size)
    assert other.fingerprint() != first.fingerprint()


def test_parameters_lie_in_reverse_registration_order():
    layout = plan_buckets([ParamSpec(numel=10), ParamSpec(numel=100), ParamSpec(numel=7)], 64)
    assert [(s.param, s.start, s.end) for s in layout.buffers[0].spans] == [
        (2, 0, 7),
        (1, 64, 164),
        (0, 1024, 1034),
    ]
    assert [(b.start, b.end, b.params) for b in layout.buckets] == [
        (0, 1024, (2, 1)),
        (1024, 2048, (0,)),
    ]


@pytest.mark.parametrize(("ranks", "size"), [(1, 40_000_000), (40, 40_000_000), (64, 64_000_000)])
def test_default_bucket_size_grows_with_many_ranks(ranks, size):
    assert default_bucket_size(ranks) == size


@given(SPECS, BUCKET_SIZES, st.integers(1, 5))
def test_slices_of_ranks_tile_every_bucket_in_whole_rows(specs, bucket_size, ranks):
    layout = plan_buckets(specs, bucket_size, lambda key: ranks + key.is_expert)
    for bucket in layout.buckets:
        count = ranks + layout.buffers[bucket.buffer].key.is_expert
        slices = [shard_of(bucket.start, bucket.end, rank, count) for rank in range(count)]
        assert [start for start, _ in slices] == [bucket.start, *(end for _, end in slices[:-1])]
        assert slices[-1][1] == bucket.end
        assert len({end - start for start, end in slices}) == 1
        assert all(start % BUFFER_ALIGNMENT == 0 for start, _ in slices)


@given(SPECS, BUCKET_SIZES, st.integers(1, 5))
def test_sharding_moves_buckets_and_nothing_within_them(specs, bucket_size, ranks):
    """So rows of the sum of squares are the same, and their sum differs in its last bits only."""
    plain, sharded = (
        plan_buckets(specs, bucket_size),
        plan_buckets(specs, bucket_size, lambda _: ranks),
    )
    for one, other in zip(plain.buckets, sharded.buckets, strict=True):
        assert one.params == other.params
        for param in one.params:
            places = [
                next(s.start for s in layout.buffers[b.buffer].spans if s.param == param) - b.start
                for layout, b in ((plain, one), (sharded, other))
            ]
            assert places[0] == places[1]
