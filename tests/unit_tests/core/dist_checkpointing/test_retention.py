"""Which checkpoints go when a new one is there: --keep-last and --save-retain-interval."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.store import CheckpointContent, write_checkpoint

EVERY = 5


def kept(last: int, keep_last: int | None, retain_interval: int | None) -> list[int]:
    """Return what a run that saves every 5 iterations up to ``last`` leaves behind."""
    there: list[int] = []
    for iteration in range(EVERY, last + 1, EVERY):
        there.append(iteration)
        doomed = folders.superfluous(there, keep_last, iteration, retain_interval)
        there = [other for other in there if other not in doomed]
    return there


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "expected"),
    [
        (None, None, [5, 10, 15, 20, 25, 30, 35, 40, 45]),
        (2, None, [40, 45]),
        (None, 20, [20, 40, 45]),
        (None, 15, [15, 30, 45]),
        (2, 20, [20, 35, 40, 45]),
        (1, 15, [15, 30, 40, 45]),
        (3, 5, [5, 10, 15, 20, 25, 30, 35, 40, 45]),
    ],
)
def test_multiples_stay_and_of_the_others_the_newest(
    keep_last: int | None, retain_interval: int | None, expected: list[int]
) -> None:
    assert kept(45, keep_last, retain_interval) == expected


@given(
    st.lists(st.integers(1, 60), min_size=1, unique=True).map(sorted),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 12),
    st.data(),
)
def test_the_newest_and_the_multiples_and_what_is_later_never_go(
    complete: list[int], keep_last: int | None, retain: int | None, data: st.DataObject
) -> None:
    current = data.draw(st.sampled_from(complete))
    doomed = folders.superfluous(complete, keep_last, current, retain)
    assert current not in doomed
    assert all(iteration < current for iteration in doomed)
    assert all(later > earlier for earlier, later in pairwise(doomed))
    if retain is not None:
        assert all(iteration % retain for iteration in doomed)
    if keep_last is None:
        assert len(doomed) <= (retain is not None)


def test_checkpoints_of_an_earlier_run_stay_without_keep_last() -> None:
    assert folders.superfluous([3, 7, 10, 15], None, 15, 20) == [10]
    assert folders.superfluous([3, 7, 10, 15], 1, 15, 20) == [3, 7, 10]


def test_saving_deletes_the_checkpoint_before(tmp_path: Path) -> None:
    for iteration in (5, 10, 15, 20, 25):
        content = CheckpointContent(tensors={}, common={"iteration": iteration})
        write_checkpoint(tmp_path, iteration, content, None, retain_interval=10)
    assert folders.complete_iterations(tmp_path) == [10, 20, 25]
    assert folders.latest_iteration(tmp_path) == 25
