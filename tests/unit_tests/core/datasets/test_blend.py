import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.datasets.blend import Blend, BlendOrder, blend_indices, normalised, parse_blend
from megatron.core.errors import ConfigError
from tests.reference import sample_index as reference

WEIGHTS = st.lists(
    st.one_of(st.floats(1e-9, 1.0), st.sampled_from([1.0, 2.0, 1 / 3])), min_size=1, max_size=9
)


def test_prefixes_without_weights_are_in_proportion_to_their_size() -> None:
    assert parse_blend(["a"]) == Blend(("a",), None)
    assert parse_blend(["a", "b", "c"]) == Blend(("a", "b", "c"), None)


def test_weights_and_prefixes_alternate() -> None:
    assert parse_blend(["3", "a", "1", "b"]) == Blend(("a", "b"), (0.75, 0.25))
    assert parse_blend(["0.5", "a"]) == Blend(("a",), (1.0,))


def test_a_single_number_is_a_prefix() -> None:
    assert parse_blend(["2024"]).prefixes == ("2024",)
    assert parse_blend(["./2024", "./2025"]) == Blend(("./2024", "./2025"), None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs at least one prefix"),
        (["0.3", "a", "0.7"], "either prefixes only or weight prefix"),
        (["0.3", "a", "b"], "either prefixes only or weight prefix"),
        (["a", "0.3", "b", "0.7"], "either prefixes only or weight prefix"),
        (["0.3", "a", "b", "c"], "either prefixes only or weight prefix"),
        (["0.3", "0.7"], "either prefixes only or weight prefix"),
        (["0", "a", "1", "b"], "positive numbers, not 0 a"),
        (["-1", "a", "nan", "b"], "positive numbers, not -1 a, nan b"),
    ],
)
def test_mixed_up_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match="--train-data-path") as error:
        parse_blend(words, "--train-data-path")
    assert said in str(error.value)


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, st.integers(1, 400), st.integers(1, 40))
def test_chunks_give_exactly_the_plain_loop(raw: list[float], size: int, chunks: int) -> None:
    weights = normalised(raw)
    even = blend_indices(weights, size, num_chunks=chunks).source_index
    assert even.tolist() == reference.even_blend(list(weights), size)
    theirs = blend_indices(weights, size, order="megatron", num_chunks=chunks).source_index
    assert theirs.tolist() == reference.megatron_blend(list(weights), size)


@settings(deadline=None, max_examples=50)
@given(WEIGHTS, st.integers(1, 120))
def test_every_prefix_is_within_one_of_its_share(raw: list[float], size: int) -> None:
    weights = normalised(raw)
    picks = blend_indices(weights, size).source_index.tolist()
    assert reference.worst_distance(list(weights), picks) <= 1 + 1e-9


def test_megatrons_order_is_not_always_within_one_of_its_share() -> None:
    weights = list(normalised([0.95, 0.025, 0.025]))
    picks = blend_indices(tuple(weights), 400, order="megatron").source_index.tolist()
    assert 1 < reference.worst_distance(weights, picks) < 2


@pytest.mark.parametrize("order", ["even", "megatron"])
def test_samples_of_each_source_are_counted_up(order: BlendOrder) -> None:
    source, sample = blend_indices((0.6, 0.3, 0.1), 5000, order=order)
    for number in range(3):
        mine = sample[source == number]
        assert mine.tolist() == list(range(len(mine)))
    assert (source.dtype, sample.dtype) == (np.int16, np.int64)


@pytest.mark.parametrize("order", ["even", "megatron"])
def test_a_longer_blend_begins_like_a_shorter_one(order: BlendOrder) -> None:
    long = blend_indices((0.7, 0.2, 0.1), 20_000, order=order)
    short = blend_indices((0.7, 0.2, 0.1), 3_000, order=order)
    assert (long.source_index[:3000] == short.source_index).all()


def test_tiny_weights_over_many_samples_never_raise() -> None:
    source, _ = blend_indices(normalised([1.0, 1e-12, 1e-5, 3.0]), 200_000)
    assert np.bincount(source, minlength=4).tolist() == [50_000, 0, 0, 150_000]
