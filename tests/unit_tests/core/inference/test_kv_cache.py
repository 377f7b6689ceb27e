"""Reading a text in pieces through the cache gives what reading it at once gives."""

import pytest
import torch

from megatron.core.inference.kv_cache import KVCache
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt, world_of_one
from tests.helpers.tolerances import TOLERANCES
from tests.reference.gpt import gpt_logits


def _cache(config: TransformerConfig, max_len: int = 16) -> KVCache:
    return KVCache(
        config.num_layers, 3, max_len, config.query_groups, config.head_dim, torch.float64, "cpu"
    )


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 1, 5], [3, 8]])
@pytest.mark.parametrize("kind", ["rope", "learned_absolute", "none"])
def test_logits_in_pieces_equal_logits_at_once(kind: str, pieces: list[int]) -> None:
    config = tiny_config(
        position_embedding_type=kind, group_query_attention=True, num_query_groups=2
    )
    model = tiny_gpt(config)
    ids, positions, _ = tiny_batch(samples=2, length=11)
    context = ForwardContext(kv_cache=_cache(config))
    with torch.no_grad():
        got = [
            model(piece, places, context=context)
            for piece, places in zip(
                ids.split(pieces, dim=1), positions.split(pieces, dim=1), strict=True
            )
        ]
        expected = model(ids, positions)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, **TOLERANCES[torch.float64])


ROPE = {"position_embedding_type": "rope"}
PROJECTIONS: dict[str, dict] = {
    "norm of heads, interleaved": ROPE | {"qk_layernorm": True, "rotary_interleaved": True},
    "norm of all heads": {
        "qk_layernorm": True,
        "qk_layernorm_scope": "all_heads",
        "normalization": "RMSNorm",
    },
    "yarn": {"position_embedding_type": "yarn", "rope_scaling_factor": 4.0},
    "longrope": ROPE
    | {
        "rope_scaling_type": "longrope",
        "rope_scaling_factor": 4.0,
        "rope_scaling_original_max_position_embeddings": 8,
        "longrope_short_factor": [1.0, 2.0, 3.0, 4.0],
        "longrope_long_factor": [2.0, 4.0, 6.0, 8.0],
    },
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_norms_and_rotations_in_pieces_equal_those_at_once(kind: str) -> None:
    config = tiny_config(group_query_attention=True, num_query_groups=2, **PROJECTIONS[kind])
    model = tiny_gpt(config)
    ids, positions, _ = tiny_batch(samples=2, length=11)
    context = ForwardContext(kv_cache=_cache(config))
    with torch.no_grad():
        got = [
            model(ids[:, part], positions[:, part], context=context)
            for part in (slice(0, 5), slice(5, 6), slice(6, 11))  # LongRoPE's length is 8
        ]
        expected = model(ids, positions)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 1, 5], [3, 8]])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["kernel", "blocks"])
def test_windows_and_sinks_reach_into_the_cache(softcap: float | None, pieces: list[int]) -> None:
    config = tiny_config(
        position_embedding_type="rope",
        window_size=[3, 0],
        window_attn_skip_freq=[1, 0],
        softmax_type="learnable",
        attn_logit_softcapping=softcap,
    )
    model = tiny_gpt(config)
    ids, positions, _ = tiny_batch(samples=2, length=11)
    context = ForwardContext(kv_cache=_cache(config))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        got = [
            model(piece, places, context=context)
            for piece, places in zip(
                ids.split(pieces, dim=1), positions.split(pieces, dim=1), strict=True
            )
        ]
        expected = gpt_logits(weights, config, ids, positions)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, **TOLERANCES[torch.float64])


def test_values_may_be_of_another_size_than_keys() -> None:
    core = DotProductAttention(tiny_config(), layer_number=1, pg_collection=world_of_one())
    query, key, value = (torch.randn(2, 4, 6, size).double() for size in (8, 8, 5))
    cache = KVCache(2, 2, 6, 4, 8, torch.float64, value_dim=5)
    with torch.no_grad():
        whole = core(query, key, value, None, ForwardContext())
        parts = []
        for part in (slice(0, 4), slice(4, 6)):
            context = ForwardContext(kv_cache=cache)
            parts.append(core(*(x[:, :, part] for x in (query, key, value)), None, context))
            cache.advance(part.stop - part.start)
    assert whole.shape == (6, 2, 4 * 5)
    torch.testing.assert_close(torch.cat(parts), whole, **TOLERANCES[torch.float64])


def test_mask_over_cached_positions_hides_them() -> None:
    config = tiny_config(position_embedding_type="rope")
    model = tiny_gpt(config)
    ids, positions, _ = tiny_batch(samples=1, length=11)
    mask = torch.zeros(1, 1, 11, 11, dtype=torch.bool)
    mask[:, :, 5:, 2:5] = True
    context = ForwardContext(kv_cache=_cache(config))
    with torch.no_grad():
        model(ids[:, :7], positions[:, :7], mask[:, :, :7, :7], context=context)
        got = model(ids[:, 7:], positions[:, 7:], mask[:, :, 7:], context=context)
        expected = model(ids, positions, mask)[:, 7:]
    torch.testing.assert_close(got, expected, **TOLERANCES[torch.float64])


def test_overfull_cache_is_refused() -> None:
    config = tiny_config()
    context = ForwardContext(kv_cache=_cache(config, max_len=8))
    with torch.no_grad(), pytest.raises(AssertionError, match="9 positions do not fit"):
        tiny_gpt(config)(*tiny_batch(length=9)[:2], context=context)
