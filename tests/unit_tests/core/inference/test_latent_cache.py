"""Generation from cached latents gives the tokens of cached keys and values, from fewer bytes."""

import pytest
import torch
from torch import Tensor

from megatron.core.inference.generate import GenerationOptions, generate, make_cache
from megatron.core.inference.kv_cache import KVCache
from megatron.core.inference.latent_cache import LatentCache
from megatron.core.inference.sampling import SamplingOptions
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.forward_context import ForwardContext
from tests.helpers.models import VOCAB, tiny_batch, tiny_config, tiny_gpt
from tests.helpers.tolerances import TOLERANCES

MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_head_dim": 5,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 7,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_interleaved": True,
}
PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12]]


def model_of(**options: object) -> GPTModel:
    return tiny_gpt(tiny_config(**(MLA | options)))


def bytes_of(cache: KVCache) -> int:
    return sum(x.untyped_storage().nbytes() for x in (cache.keys, cache.values))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 1, 5], [3, 8]])
def test_logits_in_pieces_equal_logits_at_once(pieces: list[int], cached: bool) -> None:
    model = model_of(cache_mla_latents=cached)
    ids, positions, _ = tiny_batch(samples=2, length=11)
    context = ForwardContext(kv_cache=make_cache(model.config, 2, 16))
    with torch.no_grad():
        got = [
            model(piece, places, context=context)
            for piece, places in zip(
                ids.split(pieces, dim=1), positions.split(pieces, dim=1), strict=True
            )
        ]
        expected = model(ids, positions)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("softmax_scale", [None, 0.7])
def test_both_caches_give_the_same_tokens(softmax_scale: float | None) -> None:
    found: list[list[list[int]]] = []
    for cached in (False, True):
        model = model_of(cache_mla_latents=cached, softmax_scale=softmax_scale)
        options = GenerationOptions(
            max_new_tokens=12,
            eod=VOCAB,
            vocab_size=VOCAB,
            sampling=SamplingOptions(temperature=0.0),
        )
        found.append(generate(model, model.config, PROMPTS, options))
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[0]}) > 2


def test_a_token_takes_the_bytes_of_its_latent_and_of_one_rotated_key() -> None:
    batch, length, heads, layers, fp64 = 3, 16, 4, 2, 8
    config = model_of(cache_mla_latents=True).config
    latents = make_cache(config, batch, length)
    assert isinstance(latents, LatentCache)
    assert bytes_of(latents) == layers * batch * length * (6 + 4) * fp64
    config.cache_mla_latents = False
    expanded = make_cache(config, batch, length)
    assert bytes_of(expanded) == layers * batch * length * heads * ((5 + 4) + 7) * fp64


def test_later_positions_make_no_keys_and_values_of_the_past(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(cache_mla_latents=True)
    widths: list[tuple[int, int]] = []
    for layer in model.decoder.layers.values():
        core = layer.self_attention.core_attention
        right = core.forward

        def noted(query: Tensor, key: Tensor, *rest: object, right: object = right) -> Tensor:
            widths.append((key.shape[1], key.shape[-1]))
            return right(query, key, *rest)  # type: ignore[operator]

        monkeypatch.setattr(core, "forward", noted)
    ids, positions, _ = tiny_batch(samples=2, length=6)
    context = ForwardContext(kv_cache=make_cache(model.config, 2, 8))
    with torch.no_grad():
        model(ids[:, :5], positions[:, :5], context=context)
        model(ids[:, 5:], positions[:, 5:], context=context)
    assert widths == [(4, 5 + 4)] * 2 + [(1, 6 + 4)] * 2
