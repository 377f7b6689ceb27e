"""Rotation: relative, partial, invertible; and the split of the projection by groups."""

import torch

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.rotary import split_and_rotate

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
    rotary = RotaryEmbedding(8, rotary_percent=1.0, rotary_base=10000)
    mixed = _mixed(5)
    scores = []
    for offset in (0, 7):
        query, key, _ = split_and_rotate(mixed, rotary([range(offset, offset + 5)], LIKE))
        scores.append(query[:, ::2] @ key.mT)
    torch.testing.assert_close(scores[0], scores[1])


def test_channels_beyond_the_share_are_not_rotated() -> None:
    rotary = RotaryEmbedding(8, rotary_percent=0.5, rotary_base=10000)
    query, key, _ = split_and_rotate(_mixed(5), rotary([range(3, 8)], LIKE))
    plain_query, plain_key, _ = split_and_rotate(_mixed(5), None)
    for got, plain in ((query, plain_query), (key, plain_key)):
        assert torch.equal(got[..., 4:], plain[..., 4:])
        assert not torch.isclose(got[..., :4], plain[..., :4]).any()


def test_gradients_are_those_of_finite_differences() -> None:
    tables = RotaryEmbedding(8, rotary_percent=0.5, rotary_base=100)([range(1, 4)], LIKE)
    mixed = torch.randn(
        3, 1, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert torch.autograd.gradcheck(lambda x: split_and_rotate(x, tables), mixed.requires_grad_())


def test_tables_grow_and_keep_their_values() -> None:
    rotary = RotaryEmbedding(8, rotary_percent=1.0, rotary_base=10000)
    short = rotary([range(4)], LIKE)
    long = rotary([range(9)], LIKE)
    assert torch.equal(long.cos[:4], short.cos)
    assert torch.equal(rotary([range(1, 4)], LIKE).sin, short.sin[1:])
    assert torch.equal(rotary([range(2), range(6, 8)], LIKE).cos, long.cos[[0, 1, 6, 7]])
