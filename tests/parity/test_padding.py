"""Padding on some samples, uneven over ranks: losses and gradients do not depend on the split."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.training.datasets.batch import Batch
from tests.helpers.layouts import SEQ, LayoutResult, make_batch, run_layout
from tests.parity.test_layouts import RTOL, assert_equal

Layout = tuple[int, int, int]  # ranks, expert parallel, microbatch size; 8 samples a step
BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
}


def padded_batch(sample_ids: range) -> Batch:
    """Pad the end of each sample by its number; samples 4 and 5 of each 8 are padding alone."""
    batch = make_batch(sample_ids)
    padded = [SEQ if n % 8 in (4, 5) else (3 * n) % 8 for n in sample_ids]
    mask = torch.arange(SEQ) >= SEQ - torch.tensor(padded)[:, None]
    return replace(batch, padding_mask=mask, loss_mask=batch.loss_mask.masked_fill(mask, 0.0))


def no_mask(sample_ids: range) -> Batch:
    return replace(padded_batch(sample_ids), padding_mask=None)


@functools.cache
def _run(kind: str, layout: Layout, *, masked: bool = True, bias: bool = False) -> LayoutResult:
    world_size, ep, size = layout
    options: dict[str, Any] = BIAS if bias else {}
    return run_layout(
        world_size,
        batch_of=padded_batch if masked else no_mask,
        expert_model_parallel_size=ep,
        micro_batch_size=size,
        optimizer="sgd",
        moe_router_load_balancing_type=[kind],
        moe_aux_loss_coeff=None if kind == "none" else [0.5],
        moe_z_loss_coeff=0.1,
        **options,
    )


def _assert_same(got: LayoutResult, want: LayoutResult) -> None:
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert mine.lm_loss == pytest.approx(theirs.lm_loss, rel=RTOL)
        assert_equal(mine.gradients, theirs.gradients, "gradient")
        assert_equal(mine.weights, theirs.weights, "weight")
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2), (4, 2, 1), (4, 4, 2)])
def test_sequence_and_z_loss_and_bias_do_not_depend_on_any_split(layout: Layout) -> None:
    _assert_same(
        _run("seq_aux_loss", layout, bias=True), _run("seq_aux_loss", (1, 1, 8), bias=True)
    )


@pytest.mark.parametrize("layout", [(2, 1, 2), (4, 2, 2)])
def test_balance_of_a_microbatch_does_not_depend_on_the_ranks(layout: Layout) -> None:
    _assert_same(_run("aux_loss", layout), _run("aux_loss", (1, 1, 2)))


@pytest.mark.parametrize("layout", [(2, 2, 4), (4, 2, 2)])
def test_global_balance_is_over_all_valid_tokens(layout: Layout) -> None:
    _assert_same(_run("global_aux_loss", layout), _run("aux_loss", (1, 1, 8)))


def test_padding_is_not_counted_and_the_mask_changes_the_gradient() -> None:
    result = _run("none", (1, 1, 2))
    lengths = [SEQ - (SEQ if n % 8 in (4, 5) else (3 * n) % 8) for n in range(16)]
    assert result.tokens_per_expert.sum(dim=1).tolist() == [2 * sum(lengths)] * 2
    with pytest.raises(AssertionError, match="gradient of"):
        _assert_same(result, _run("none", (1, 1, 2), masked=False))
