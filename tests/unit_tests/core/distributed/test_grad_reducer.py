import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.distributed.bucket_layout import ParamSpec, plan_buckets
from megatron.core.distributed.grad_reducer import GradReducer


class Work:
    def __init__(self):
        self.waits = 0

    def wait(self):
        self.waits += 1


def reducer(num_params):
    specs = [
        ParamSpec(numel=40, is_expert=n % 3 == 0, decays=n % 2 == 0) for n in range(num_params)
    ]
    buckets = plan_buckets(specs, 100).buckets
    launched, works = [], []

    def launch(bucket):
        launched.append(bucket)
        works.append(Work())
        return works[-1]

    return GradReducer(buckets, launch), buckets, launched, works


@given(st.integers(1, 20), st.data())
def test_whatever_order_gradients_come_in_all_buckets_are_launched_in_one_order(count, data):
    made, buckets, launched, works = reducer(count)
    order = data.draw(st.permutations(range(count)))
    arriving = order[: data.draw(st.integers(0, count))]  # some parameters get no gradient
    for param in arriving:
        if not made.is_late(param):
            made.mark_filled(param)
        for bucket in launched:
            assert set(bucket.params) <= set(arriving)
    made.finish()
    assert tuple(launched) == buckets
    assert [work.waits for work in works] == [1] * len(buckets)


def test_buckets_are_launched_while_backward_goes_on():
    made, buckets, launched, _ = reducer(12)
    for param in reversed(range(12)):
        made.mark_filled(param)
        for bucket in buckets:
            filled = min(bucket.params) >= param
            assert (bucket in launched) == filled
    assert len(launched) == len(buckets) > 3


def test_a_gradient_after_the_launch_of_its_bucket_is_late():
    made, _, launched, _ = reducer(6)
    assert not made.is_late(5)
    for param in reversed(range(6)):
        made.mark_filled(param)
    assert launched
    assert made.is_late(5)
    made.finish()
    made.reset()
    assert not made.is_late(5)


def test_reducing_the_same_gradients_twice_is_refused():
    made, _, _, _ = reducer(2)
    made.finish()
    with pytest.raises(AssertionError, match="reduced already"):
        made.finish()


@given(st.integers(1, 12), st.data())
def test_a_bucket_waits_for_what_was_put_off_whatever_came_first(count, data):
    made, buckets, launched, _ = reducer(count)
    put_off = data.draw(st.lists(st.integers(0, count - 1), max_size=2 * count))
    for param in put_off:
        made.put_off(param)
    left = list(put_off)
    events = [("filled", p) for p in range(count)] + [("settled", p) for p in put_off]
    filled = set()
    for kind, param in data.draw(st.permutations(events)):
        if kind == "filled":
            made.mark_filled(param)
            filled.add(param)
        else:
            made.settle(param)
            left.remove(param)
        assert made.unsettled() == sorted(set(left))
        whole = filled - set(left)
        for bucket in launched:
            assert set(bucket.params) <= whole
        reached = 0
        while reached < len(buckets) and set(buckets[reached].params) <= whole:
            reached += 1
        assert len(launched) == reached
    assert tuple(launched) == buckets


def test_settling_what_was_not_put_off_is_refused():
    made, _, _, _ = reducer(2)
    made.put_off(1)
    made.settle(1)
    with pytest.raises(AssertionError, match="no gradient of parameter 1"):
        made.settle(1)
