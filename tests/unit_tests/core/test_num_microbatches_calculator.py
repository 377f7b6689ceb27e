import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from megatron.core.num_microbatches_calculator import NumMicroBatches

SMALL = st.integers(1, 50)


@given(SMALL, SMALL, SMALL)
def test_all_ranks_and_microbatches_together_make_the_global_batch(micro, data_parallel, count):
    made = NumMicroBatches(
        global_batch_size=micro * data_parallel * count,
        micro_batch_size=micro,
        data_parallel_size=data_parallel,
    )
    assert made.count == count


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            (10, 2, 4),
            "--global-batch-size 10 must be a multiple of --micro-batch-size 2 x 4 data-parallel "
            "ranks (= 8); nearest: 8 or 16",
        ),
        (
            (4, 2, 4),
            "--global-batch-size 4 must be a multiple of --micro-batch-size 2 x 4 data-parallel "
            "ranks (= 8); nearest: 8",
        ),
        ((0, 2, 4), "--global-batch-size 0 must be at least 1"),
        ((8, -1, 4), "--micro-batch-size -1 must be at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(sizes, sentence):
    with pytest.raises(ConfigError) as error:
        NumMicroBatches(
            global_batch_size=sizes[0], micro_batch_size=sizes[1], data_parallel_size=sizes[2]
        )
    assert str(error.value) == f"invalid configuration:\n  - {sentence}"
