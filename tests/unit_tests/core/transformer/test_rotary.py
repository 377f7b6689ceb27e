"""Rotation: relative, partial, invertible; and the split of the projection by groups."""

import pytest
import torch

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.config.rotary import RotaryConfig
from megatron.core.transformer.rotary import rotate, split_and_rotate
from megatron.core.transformer.rotary_frequencies import rotary_frequencies
from tests.reference import rotary as reference


def _rotary(
    percent: float = 1.0, base: float = 10000, interleaved: bool = False
) -> RotaryEmbedding:
    config = RotaryConfig(
        position_embedding_type="rope", rotary_base=base, rotary_interleaved=interleaved
    )
    return RotaryEmbedding(config, channels=8, rotary_dim=int(8 * percent))


LIKE = torch.empty(0, dtype=torch.float64)


def _mixed(s: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(s)
    return torch.randn(s, 2, 3, 4, 8, dtype=torch.float64, generator=generator)


def test_without_tables_the_projection_is_only_split() -> None:
    mixed = _mixed(5)
    query, key, value = split_and_rotate(mixed, None)
    assert torch.equal(query[1, 3], mixed[:, 1, 1, 1])  # head 3 = second query of group 1
    assert torch.equal(key[1, 2], mixed[:, 1, 2, 2])
    assert torch.equal(value[1, 2], mixed[:, 1, 2, 3])


def test_scores_depend_on_differences_of_positions_only() -> None:
    rotary = _rotary()
    mixed = _mixed(5)
    scores = []
    for offset in (0, 7):
        query, key, _ = split_and_rotate(
            mixed, rotary([range(offset, offset + 5)], LIKE, length=32)
        )
        scores.append(query[:, ::2] @ key.mT)
    torch.testing.assert_close(scores[0], scores[1])


def test_channels_beyond_the_share_are_not_rotated() -> None:
    rotary = _rotary(0.5)
    query, key, _ = split_and_rotate(_mixed(5), rotary([range(3, 8)], LIKE, length=32))
    plain_query, plain_key, _ = split_and_rotate(_mixed(5), None)
    for got, plain in ((query, plain_query), (key, plain_key)):
        assert torch.equal(got[..., 4:], plain[..., 4:])
        assert not torch.isclose(got[..., :4], plain[..., :4]).any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_are_those_of_finite_differences(interleaved: bool) -> None:
    tables = _rotary(0.5, 100, interleaved)([range(1, 4)], LIKE, length=32)
    mixed = torch.randn(
        3, 1, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, tables), mixed)
    assert torch.autograd.gradcheck(lambda x: rotate(x, tables), mixed)


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_rotated_alone_are_those_of_the_whole_projection(interleaved: bool) -> None:
    tables = _rotary(0.5, 100, interleaved)([range(4), range(9, 10)], LIKE, length=32)
    mixed = _mixed(5)
    query, key, value = split_and_rotate(mixed, tables)
    assert torch.equal(rotate(mixed[..., :-2, :], tables), query)
    assert torch.equal(rotate(mixed[..., -2, :], tables), key)
    assert torch.equal(rotate(mixed[..., -1:, :], None), value)
    speeds = [100 ** (-pair / 2) for pair in range(2)]
    for place, position in ((2, 2), (4, 9)):
        plain = mixed[place, 1, 2, 1]
        wanted = reference.rotate(plain, position, speeds=speeds, interleaved=interleaved)
        torch.testing.assert_close(query[1, 5, place], wanted)


def test_neighbours_are_pairs_when_interleaved() -> None:
    mixed = torch.zeros(1, 1, 1, 3, 8, dtype=torch.float64)
    mixed[..., 2] = 1.0
    for interleaved, partner in ((True, 3), (False, 6)):
        tables = _rotary(interleaved=interleaved)([range(5, 6)], LIKE, length=32)
        query = split_and_rotate(mixed, tables)[0].flatten()
        assert query.nonzero().flatten().tolist() == [2, partner]


def test_rotated_channels_alone_grow_by_the_attention_factor() -> None:
    config = RotaryConfig(
        position_embedding_type="yarn", rope_scaling_factor=4.0, rope_attention_factor=1.5
    )
    tables = RotaryEmbedding(config, channels=8, rotary_dim=4)([range(3)], LIKE, length=3)
    assert torch.equal(tables.cos[0], torch.tensor([1.5] * 4 + [1.0] * 4, dtype=torch.float64))
    assert torch.equal(tables.sin[:, 4:], torch.zeros(3, 4, dtype=torch.float64))


def test_longrope_follows_the_length_of_the_whole_sequence() -> None:
    config = RotaryConfig(
        position_embedding_type="rope",
        rope_scaling_type="longrope",
        rope_scaling_factor=2.0,
        rope_scaling_original_max_position_embeddings=8,
        longrope_short_factor=[1.0, 2.0],
        longrope_long_factor=[3.0, 5.0],
    )
    rotary = RotaryEmbedding(config, channels=4, rotary_dim=4)
    short, long = (rotary([range(4)], LIKE, length=length) for length in (8, 9))
    angles = [
        torch.asin(t.sin[1, 2:] / rotary_frequencies(config, 4).magnitude) for t in (short, long)
    ]
    torch.testing.assert_close(angles[0], torch.tensor([1.0, 0.01 / 2], dtype=torch.float64))
    torch.testing.assert_close(angles[1], torch.tensor([1 / 3, 0.01 / 5], dtype=torch.float64))
    assert torch.equal(rotary([range(4)], LIKE, length=8).sin, short.sin)


def test_tables_grow_and_keep_their_values() -> None:
    rotary = _rotary()
    short = rotary([range(4)], LIKE, length=32)
    long = rotary([range(9)], LIKE, length=32)
    assert torch.equal(long.cos[:4], short.cos)
    assert torch.equal(rotary([range(1, 4)], LIKE, length=32).sin, short.sin[1:])
    assert torch.equal(rotary([range(2), range(6, 8)], LIKE, length=32).cos, long.cos[[0, 1, 6, 7]])
