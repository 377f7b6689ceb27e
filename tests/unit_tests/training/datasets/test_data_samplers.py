from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from megatron.training.datasets.data_samplers import SamplePlan


def read(
    consumed: int, total: int, mbs: int, dp: int, rank: int, limit: int = 10_000
) -> list[tuple[int, ...]]:
    plan = SamplePlan(micro_batch_size=mbs, data_parallel_rank=rank, data_parallel_size=dp)
    return list(islice(plan.microbatches(consumed, total), limit))


SIZES = {"mbs": st.integers(1, 5), "dp": st.integers(1, 5), "consumed": st.integers(0, 50)}


@given(num_microbatches=st.integers(1, 4), **SIZES)
def test_the_ranks_together_read_each_global_batch_once(
    mbs: int, dp: int, consumed: int, num_microbatches: int
) -> None:
    size = mbs * dp * num_microbatches
    for step in range(3):
        start = consumed + step * size
        read_by_all = [
            number
            for rank in range(dp)
            for microbatch in read(start, 10_000, mbs, dp, rank, num_microbatches)
            for number in microbatch
        ]
        assert sorted(read_by_all) == list(range(start, start + size))


@given(steps=st.integers(0, 6), **SIZES)
def test_resuming_anywhere_gives_the_same_remainder(
    mbs: int, dp: int, consumed: int, steps: int
) -> None:
    for rank in range(dp):
        whole = read(consumed, 200, mbs, dp, rank)
        assert read(consumed + steps * mbs * dp, 200, mbs, dp, rank) == whole[steps:]


@given(total=st.integers(0, 60), **SIZES)
def test_all_ranks_end_at_the_same_full_microbatch(
    mbs: int, dp: int, consumed: int, total: int
) -> None:
    counts = {len(read(consumed, total, mbs, dp, rank)) for rank in range(dp)}
    assert counts == {max(0, total - consumed) // (mbs * dp)}


def test_a_microbatch_is_a_run_of_numbers_in_the_order_of_the_ranks() -> None:
    assert read(10, 100, mbs=2, dp=3, rank=0, limit=2) == [(10, 11), (16, 17)]
    assert read(10, 100, mbs=2, dp=3, rank=2, limit=2) == [(14, 15), (20, 21)]
