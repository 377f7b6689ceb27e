import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.datasets.splits import parse_split, split_ranges
from megatron.core.errors import ConfigError


def test_shares_are_normalised() -> None:
    assert parse_split("969,30,1") == (0.969, 0.03, 0.001)
    assert parse_split(" 98 / 2 ") == (0.98, 0.02, 0.0)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split("0.9, .05; 0.05") == pytest.approx((0.9, 0.05, 0.05))


@pytest.mark.parametrize("text", ["", "0,0,0", "1,2,3,4", "9,-1", "a,b", "nan", "inf,1", "90%"])
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--split .*969,30,1"):
        parse_split(text)


@given(
    st.tuples(*[st.floats(0, 1000)] * 3).filter(lambda shares: sum(shares) > 1e-3),
    st.integers(0, 10**9),
)
def test_splits_cover_every_document_once(shares: tuple[float, ...], documents: int) -> None:
    ranges = split_ranges(parse_split(",".join(map(repr, shares))), documents)
    assert [begin for begin, _ in ranges] == [0, ranges[0][1], ranges[1][1]]
    assert ranges[2][1] == documents
    assert all(begin <= end for begin, end in ranges)


def test_borders_round_half_to_even() -> None:
    assert split_ranges((0.5, 0.5, 0.0), 5) == ((0, 2), (2, 5), (5, 5))
    assert split_ranges((0.969, 0.03, 0.001), 1000) == ((0, 969), (969, 999), (999, 1000))
