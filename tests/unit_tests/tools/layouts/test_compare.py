"""Two runs are compared tensor by tensor; a factor of 1.05 is seen in every dtype."""

import pytest
import torch

from tools.layouts.causes import likely_cause, named_sizes, ratio_in_words
from tools.layouts.compare import TOLERANCES, Difference, compare, measure
from tools.layouts.first_difference import First
from tools.layouts.oracle import LayoutResult, StepRecord

NOISE = {"fp64": 1e-15, "fp32": 2.0**-22, "bf16": 2.0**-7}
"""Relative rounding of one element, as sums in another order have it."""


def _result(seed: int = 0, **change: object) -> LayoutResult:
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(40, 8, generator=rng, dtype=torch.float64) for name in ("a", "b", "c")
    }
    step = StepRecord(2.5, 0.7, tensors, {k: v * 3 for k, v in tensors.items()})
    step = step._replace(**change)
    return LayoutResult(tensors, [step], torch.arange(8).view(2, 4), {"0/entropy": 1.25})


def _noisy(tensors: dict[str, torch.Tensor], size: float) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {
        name: t + size * t.abs().max() * torch.randn(t.shape, generator=rng, dtype=t.dtype)
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_is_equal_and_a_factor_of_a_twentieth_is_not(dtype):
    want = _result()
    right = _noisy(want.steps[0].gradients, NOISE[dtype])
    found = compare(_result(gradients=right), want, TOLERANCES[dtype])
    assert found.first is None
    assert not found.is_bit_equal
    for factor in (1.05, 1 / 1.05):
        wrong = right | {"b": right["b"] * factor}
        found = compare(_result(gradients=wrong), want, TOLERANCES[dtype])
        assert found.first is not None
        assert found.first.title == "gradient of b"
        assert found.first.ratio == pytest.approx(factor, rel=0.02)


def test_the_same_bits_are_told():
    assert compare(_result(), _result(), TOLERANCES["fp64"]).is_bit_equal


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({"lm_loss": 2.5 * (1 + 1e-9)}, "lm loss"),
        ({"grad_norm": None}, "grad norm"),
        ({"gradients": {}}, "missing gradient of a"),
        ({"weights": _result(3).steps[0].weights}, "weight of a"),
    ],
)
def test_each_thing_that_differs_is_named(change, title):
    found = compare(_result(**change), _result(), TOLERANCES["fp64"])
    assert found.first is not None
    assert found.first.title == title


def test_counts_and_figures_are_compared():
    want = _result()
    counts = want.tokens_per_expert.clone()
    counts[0, 0] += 1
    found = compare(want._replace(tokens_per_expert=counts), want, TOLERANCES["bf16"])
    assert found.first is not None
    assert found.first.title == "tokens per expert"
    found = compare(want._replace(metrics={}), want, TOLERANCES["fp64"])
    assert found.first is not None
    assert found.first.title == "metric of 0/entropy"


def test_what_is_zero_but_for_rounding_is_measured_on_the_scale_of_its_kind():
    tiny, other = torch.full((4,), 1e-19), torch.full((4,), -3e-19)
    assert measure(0, "gradient", "x", other, tiny, scale=1.0).error < 1e-12
    assert measure(0, "gradient", "x", other, tiny).error > 1


def _first(what: str, name: str, ratio: float, residual: float = 0.0, *others: str) -> First:
    return First(Difference(0, what, name, 0.5, ratio, residual), (), (0,), others or (name,))


SIZES = named_sizes({"tp": 2, "cp": 1, "pp": 1, "dp": 4, "ep": 2, "etp": 1}, 3)


@pytest.mark.parametrize(
    ("ratio", "residual", "words"),
    [
        (2.0, 1e-9, "factor 2 = TP = EP"),
        (0.25, 1e-9, "factor 0.25 = 1 / DP = 1 / EDP"),
        (3.0, 0.0, "factor 3 = microbatches"),
        (24.0, 0.0, "factor 24"),
        (0.0, 0.0, "factor 0: it is missing"),
        (1.7, 0.4, "no single factor"),
        (float("nan"), 0.0, "the right one is zero"),
    ],
)
def test_a_factor_is_named_by_the_sizes_it_may_come_from(ratio, residual, words):
    assert words in ratio_in_words(_first("gradient", "x", ratio, residual), SIZES)


LAYER = "decoder.layers.0"


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (_first("initial weight", "a", 1), "drawn by something that depends on the rank"),
        (_first("output", "embedding", 1), "vocabulary slices"),
        (_first("output", f"{LAYER}.self_attention", 1), "heads or keys"),
        (_first("output", f"{LAYER}.mlp", 1), "splits of the dispatcher"),
        (_first("output", LAYER, 1), "residual sum"),
        (_first("lm loss", "", 2), "over the wrong group"),
        (_first("gradient of", "loss of each token", 2), "divided by before backward"),
        (_first("gradient of", LAYER, 2), "not the mirror"),
        (
            _first("gradient", f"{LAYER}.mlp.experts.local_experts.1.linear_fc1.weight", 2),
            "experts",
        ),
        (_first("gradient", f"{LAYER}.mlp.router.weight", 2), "scale of balance losses"),
        (_first("gradient", "embedding.word_embeddings.weight", 2), "tied weight"),
        (_first("gradient", f"{LAYER}.input_layernorm.weight", 1), "not summed over tp"),
        (_first("grad norm", "", 1.4), "counted twice"),
        (_first("weight", f"{LAYER}.mlp.router.expert_bias", 1), "expert biases"),
        (_first("weight", "a", 1), "sharded optimizer"),
        (_first("metric", "0/entropy", 2), "figures alone"),
        (_first("missing gradient", "a", 2), "gradients of others"),
    ],
)
def test_a_cause_is_told_in_words(first, words):
    assert words in likely_cause(first)
