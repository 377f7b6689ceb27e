import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.datasets.sample_index import (
    EpochPlan,
    SampleIndices,
    build_sample_indices,
    count_samples,
    plan_epochs,
)
from tests.reference import sample_index as reference

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def build(
    lengths: list[int], seq_length: int, num_samples: int | None, seed: int = 1234
) -> tuple[EpochPlan, SampleIndices]:
    plan = plan_epochs(sum(lengths), seq_length, num_samples)
    array = np.array(lengths, dtype=np.int32)
    return plan, build_sample_indices(
        array, (0, len(lengths)), seq_length=seq_length, plan=plan, seed=seed
    )


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 7), st.integers(1, 60))
def test_the_arrays_equal_the_plain_loop(lengths: list[int], s: int, num_samples: int) -> None:
    plan, found = build(lengths, s, num_samples)
    assert plan == reference.epochs(sum(lengths), s, num_samples)

    rng = np.random.RandomState(1234)
    documents = reference.shuffled_documents(list(range(len(lengths))), *plan, rng)
    assert found.document_index.tolist() == documents
    assert found.sample_index.tolist() == reference.sample_index(lengths, documents, s)

    total = len(found.sample_index) - 1
    apart = total
    if plan.separate_last_epoch:
        apart = ((plan.num_epochs - 1) * sum(lengths) - 1) // s
    first, last = np.arange(apart), np.arange(apart, total)
    rng.shuffle(first)
    rng.shuffle(last)
    assert found.shuffle_index.tolist() == [*first, *last]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 7), st.integers(1, 60))
def test_there_are_as_many_samples_as_asked_for(lengths: list[int], s: int, wanted: int) -> None:
    plan, found = build(lengths, s, wanted)
    assert len(found.shuffle_index) >= wanted
    assert sorted(found.shuffle_index.tolist()) == list(range(len(found.shuffle_index)))
    if plan.num_epochs > 1:
        assert count_samples((plan.num_epochs - 1) * sum(lengths), s) < wanted


def test_numpy_keeps_the_order_of_existing_runs() -> None:
    plan, found = build([5, 3, 4, 8], seq_length=3, num_samples=9, seed=7)
    assert plan == (2, True)
    assert found.document_index.tolist() == [2, 1, 0, 3, 3, 1, 0, 2]
    assert found.sample_index.tolist() == [
        [0, 0],
        [0, 3],
        [1, 2],
        [2, 2],
        [3, 0],
        [3, 3],
        [3, 6],
        [4, 1],
        [4, 4],
        [4, 7],
        [5, 2],
        [6, 2],
        [7, 0],
        [7, 3],
    ]
    assert found.shuffle_index.tolist() == [4, 5, 3, 2, 1, 0, 7, 8, 11, 9, 12, 10, 6]


def test_the_last_epoch_is_apart_only_below_four_fifths() -> None:
    # 101 tokens of s = 1: 100 samples an epoch, 80 of them are the border
    assert plan_epochs(101, 1, 100 + 79 + 1) == (2, False)
    assert plan_epochs(101, 1, 100 + 79) == (2, True)


def test_the_last_epoch_stays_behind_the_others() -> None:
    plan, found = build([10, 10, 10], seq_length=1, num_samples=31)
    assert plan == (2, True)
    assert sorted(found.document_index[:3]) == [0, 1, 2]
    assert sorted(found.shuffle_index[:29].tolist()) == list(range(29))


def test_one_more_token_makes_one_more_epoch() -> None:
    assert plan_epochs(21, 10, 2).num_epochs == 1
    assert plan_epochs(20, 10, 2).num_epochs == 2


def test_dtypes_are_those_of_existing_cache_files() -> None:
    _, found = build([10, 10], seq_length=4, num_samples=3)
    assert [array.dtype for array in found] == [np.int32, np.int32, np.uint32]


def test_documents_of_a_split_keep_their_numbers() -> None:
    lengths = np.array([9, 9, 4, 4, 9], dtype=np.int32)
    found = build_sample_indices(lengths, (2, 4), seq_length=3, plan=EpochPlan(1, False), seed=1)
    assert sorted(found.document_index.tolist()) == [2, 3]
    assert found.sample_index.tolist() == [[0, 0], [0, 3], [1, 2]]


def test_a_million_documents_take_no_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, size=1_000_000, dtype=np.int32)
    begin = time.thread_time()
    plan = plan_epochs(int(lengths.sum(dtype=np.int64)), 1024, None)
    found = build_sample_indices(lengths, (0, len(lengths)), seq_length=1024, plan=plan, seed=1234)
    assert len(found.shuffle_index) == 977_299
    assert time.thread_time() - begin < 2.0
