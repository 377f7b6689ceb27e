"""R1: a balance loss depends on the split of a batch only as far as its scope says."""

import functools

import pytest

from tests.helpers.layouts import LayoutResult, run_layout
from tests.parity.test_layouts import RTOL, assert_equal

Layout = tuple[int, int, int]  # ranks, expert parallel, microbatch size; 8 samples a step


@functools.cache
def _run(kind: str, layout: Layout) -> LayoutResult:
    world_size, ep, size = layout
    return run_layout(
        world_size,
        expert_model_parallel_size=ep,
        micro_batch_size=size,
        optimizer="sgd",
        moe_router_load_balancing_type=[kind],
        moe_aux_loss_coeff=[0.5],
    )


def _assert_same(got: LayoutResult, want: LayoutResult) -> None:
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert mine.lm_loss == pytest.approx(theirs.lm_loss, rel=RTOL)
        assert_equal(mine.gradients, theirs.gradients, "gradient")


@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 1, 1), (2, 2, 1), (4, 2, 2), (4, 4, 1)])
def test_balance_within_sequences_does_not_depend_on_any_split(layout: Layout) -> None:
    _assert_same(_run("seq_aux_loss", layout), _run("seq_aux_loss", (1, 1, 8)))


@pytest.mark.parametrize("layout", [(2, 1, 2), (2, 2, 2), (4, 2, 1), (4, 4, 1)])
def test_global_balance_does_not_depend_on_the_split_over_ranks(layout: Layout) -> None:
    """Two microbatches a step on every layout: the scope is all ranks, and the step so far."""
    _assert_same(_run("global_aux_loss", layout), _run("global_aux_loss", (1, 1, 4)))


@pytest.mark.parametrize("layout", [(1, 1, 8), (2, 2, 4), (4, 2, 2)])
def test_global_balance_of_one_microbatch_is_the_balance_of_the_whole_batch(layout: Layout) -> None:
    _assert_same(_run("global_aux_loss", layout), _run("aux_loss", (1, 1, 8)))


def test_balance_within_a_microbatch_does_depend_on_its_size() -> None:
    with pytest.raises(AssertionError, match="gradient of"):
        _assert_same(_run("aux_loss", (2, 1, 2)), _run("aux_loss", (1, 1, 4)))
