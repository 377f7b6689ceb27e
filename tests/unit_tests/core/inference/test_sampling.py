import math

import pytest
import torch

from megatron.core.inference.sampling import SamplingOptions, choose_tokens, ranked_probs

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
NO = float("-inf")


def chosen(logits: torch.Tensor, chance: float, **options) -> int:
    rows = torch.full((logits.shape[0],), chance, dtype=torch.float64)
    return choose_tokens(logits, SamplingOptions(**options), rows)[0].item()


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    tokens = choose_tokens(logits, SamplingOptions(temperature=0), torch.ones(2))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("chance", "token"), [(0.0, 1), (0.39, 1), (0.41, 3), (0.69, 3), (0.71, 2), (0.91, 0)]
)
def test_chance_runs_through_the_tokens_from_the_likeliest_down(chance: float, token: int) -> None:
    assert chosen(LOGITS, chance) == token


def test_every_chance_below_one_gives_a_token_that_is_possible() -> None:
    logits = torch.tensor([[NO, 1.0, NO, 2.0, NO]])
    last = math.nextafter(1.0, 0.0)
    assert chosen(logits, last) == 1
    assert chosen(logits, last, top_k=1) == 3
    assert chosen(logits, last, temperature=1e-6) == 3


def test_a_chance_on_the_border_belongs_to_the_next_token() -> None:
    assert chosen(torch.zeros(1, 2), 0.5) == 1


def test_draws_follow_the_probabilities() -> None:
    chance = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = choose_tokens(LOGITS.expand(20_000, -1), SamplingOptions(), chance)
    shares = tokens.bincount(minlength=4) / 20_000
    assert torch.allclose(shares, LOGITS[0].exp(), atol=0.01)


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 2), (4, 4), (9, 4), (0, 4)])
def test_top_k_keeps_so_many(top_k: int, kept: int) -> None:
    probs, _ = ranked_probs(LOGITS, SamplingOptions(top_k=top_k))
    assert (probs > 0).sum() == kept


def test_top_k_keeps_exactly_so_many_of_equals() -> None:
    probs, ids = ranked_probs(torch.zeros(1, 5), SamplingOptions(top_k=2))
    assert ids[probs > 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (1.0, 4), (0.0, 4)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    probs, _ = ranked_probs(LOGITS, SamplingOptions(top_p=top_p))
    assert (probs > 0).sum() == kept


def test_top_p_counts_among_what_top_k_left() -> None:
    # of 0.4 and 0.3 the first has 0.57: alone it reaches 0.5, not 0.6
    assert (ranked_probs(LOGITS, SamplingOptions(top_k=2, top_p=0.5))[0] > 0).sum() == 1
    assert (ranked_probs(LOGITS, SamplingOptions(top_k=2, top_p=0.6))[0] > 0).sum() == 2


def test_temperature_divides_the_logits() -> None:
    probs, _ = ranked_probs(torch.tensor([[2.0, 0.0]]), SamplingOptions(temperature=2.0))
    assert probs[0, 0].item() == pytest.approx(math.e / (1 + math.e))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_and_temperatures_stay_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0]], dtype=dtype)
    for temperature in (1e-30, 1.0, 1e30):
        probs, _ = ranked_probs(logits, SamplingOptions(temperature=temperature))
        assert torch.isfinite(probs).all()
        assert probs[0, 0] > 0


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 1.5}, "--top-p"),
        ({"temperature": 0.0, "top_k": 5}, "no effect"),
    ],
)
def test_senseless_options_are_named(options: dict, flag: str) -> None:
    (problem,) = SamplingOptions(**options).problems()
    assert flag in problem
