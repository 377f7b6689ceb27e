import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.distributed.bucket_layout import (
    BUFFER_ALIGNMENT,
    PARAM_ALIGNMENT,
    ParamSpec,
    default_bucket_size,
    plan_buckets,
)

SPECS = st.lists(
    st.builds(
        ParamSpec,
        numel=st.integers(1, 5000),
        is_expert=st.booleans(),
        decays=st.booleans(),
        dtype=st.sampled_from(["torch.float32", "torch.bfloat16"]),
        split_over=st.sampled_from([None, "tp"]),
    ),
    min_size=1,
    max_size=20,
)
BUCKET_SIZES = st.integers(1, 20000)


@given(SPECS, BUCKET_SIZES)
def test_every_parameter_has_one_aligned_span_in_the_buffer_of_its_kind(specs, bucket_size):
    layout = plan_buckets(specs, bucket_size)
    seen = []
    for buffer in layout.buffers:
        assert buffer.numel % BUFFER_ALIGNMENT == 0
        end = 0
        for span in buffer.spans:
            spec = specs[span.param]
            assert (spec.is_expert, spec.decays, spec.dtype, spec.split_over, False) == buffer.key
            assert span.end - span.start == spec.numel
            assert span.start % PARAM_ALIGNMENT == 0
            assert 0 <= span.start - end < PARAM_ALIGNMENT
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
    filled_at = [
        max(len(specs) - 1 - param for param in bucket.params)
        for bucket in plan_buckets(specs, bucket_size).buckets
    ]
    assert filled_at == sorted(filled_at)


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
        (0, 192, 202),
    ]
    assert [(b.start, b.end, b.params) for b in layout.buckets] == [
        (0, 192, (2, 1)),
        (192, 1024, (0,)),
    ]


@pytest.mark.parametrize(("ranks", "size"), [(1, 40_000_000), (40, 40_000_000), (64, 64_000_000)])
def test_default_bucket_size_grows_with_many_ranks(ranks, size):
    assert default_bucket_size(ranks) == size
