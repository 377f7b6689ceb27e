"""GPTModel against the written-out reference, and what users rely on."""

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.tensor_parallel.random import SampleRng
from megatron.core.transformer.forward_context import ForwardContext
from tests.helpers.models import MAX_LENGTH, VOCAB, tiny_batch, tiny_config, tiny_gpt
from tests.helpers.tolerances import TOLERANCES
from tests.reference.activations import OPTIONS
from tests.reference.gpt import gpt_logits, token_losses

SHAPES = {
    "learned, LayerNorm, gelu, biases": {},
    "rope, RMSNorm, swiglu, grouped, untied": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "group_query_attention": True,
        "num_query_groups": 2,
        "untie_embeddings_and_output_weights": True,
    },
    "half rope, one group, wide heads, qkv bias": {
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_base": 100,
        "group_query_attention": True,
        "num_query_groups": 1,
        "kv_channels": 12,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    },
    "norms of heads, interleaved half rope, wide heads": {
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_base": 25.5,
        "rotary_interleaved": True,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 12,
        "add_bias_linear": False,
        "add_proj_bias": True,
    },
    "yarn, part of a head": {
        "position_embedding_type": "yarn",
        "rotary_percent": 0.75,
        "rope_scaling_factor": 4.0,
        "rope_scaling_original_max_position_embeddings": 12,
        "yarn_beta_fast": 1.5,
        "yarn_beta_slow": 0.01,
        "mscale": 0.7,
        "mscale_all_dim": 2.0,
    },
    "longrope beyond its original length, interleaved": {
        "position_embedding_type": "rope",
        "rope_scaling_type": "longrope",
        "rope_scaling_original_max_position_embeddings": 5,
        "max_position_embeddings": 24,
        "longrope_short_factor": [1.0, 1.0, 1.0, 1.0],
        "longrope_long_factor": [1.5, 2.5, 4.0, 9.0],
        "rotary_interleaved": True,
    },
    "llama3": {
        "position_embedding_type": "rope",
        "use_rope_scaling": True,
        "rope_scaling_original_max_position_embeddings": 16,
        "rotary_base": 20.0,
    },
    "LayerNorm of heads, no positions": {
        "position_embedding_type": "none",
        "qk_layernorm": True,
    },
    "norm of all heads, rope": {
        "position_embedding_type": "rope",
        "rotary_base": 30.0,
        "qk_layernorm": True,
        "qk_layernorm_scope": "all_heads",
        "normalization": "RMSNorm",
        "group_query_attention": True,
        "num_query_groups": 2,
    },
    "clamped quick GEGLU, biases of MLPs alone": {
        "add_bias_linear": False,
        "add_mlp_bias": True,
        **OPTIONS["gpt_oss"],
    },
    "GELU by tanh": {"openai_gelu": True},
    "norm of all heads, weights around 1": {
        "qk_layernorm": True,
        "qk_layernorm_scope": "all_heads",
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": True,
    },
    "norm of heads, weights around 1": {
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
    },
    "no positions, RMSNorm, gelu": {"position_embedding_type": "none", "normalization": "RMSNorm"},
    "learned, swiglu, biases, untied": {
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
    },
    "windows in the first layer, learnt sinks": {
        "window_size": [2, 0],
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
        "position_embedding_type": "rope",
        "group_query_attention": True,
        "num_query_groups": 2,
    },
    "capped scores of another scale, off by one": {
        "attn_logit_softcapping": 2.0,
        "softmax_scale": 0.7,
        "softmax_type": "off-by-one",
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_every_gradient_equal_the_reference(shape: str, dtype: torch.dtype) -> None:
    config = tiny_config(**SHAPES[shape], fp64=dtype == torch.float64)
    model = tiny_gpt(config, spread=8.0 if dtype == torch.float64 else 3.0)
    ids, positions, labels = tiny_batch(samples=2, length=6)
    weights = {k: v.detach().double().requires_grad_() for k, v in model.named_parameters()}

    loss = model(ids, positions, labels=labels)
    expected = token_losses(gpt_logits(weights, config, ids, positions), labels)
    scale = torch.linspace(0.5, 1.5, labels.numel(), dtype=torch.float64).view_as(labels)
    (loss * scale.to(loss.dtype)).mean().backward()
    (expected * scale).mean().backward()

    torch.testing.assert_close(loss, expected.to(dtype), **TOLERANCES[dtype])
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.grad,
            weights[name].grad.to(dtype),
            **TOLERANCES[dtype],
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_a_position_do_not_depend_on_later_tokens(shape: str) -> None:
    model = tiny_gpt(tiny_config(**SHAPES[shape]))
    ids, positions, _ = tiny_batch()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    before, after = model(ids, positions), model(changed, positions)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).any(dim=-1).all()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("positions_type", ["rope", "learned_absolute"])
def test_masked_documents_do_not_see_each_other(
    positions_type: str, dropout: float, grad: bool
) -> None:
    config = tiny_config(position_embedding_type=positions_type, attention_dropout=dropout)
    model = tiny_gpt(config)
    ids, _, _ = tiny_batch(samples=1, length=11)
    positions = torch.cat([torch.arange(5), torch.arange(6)]).unsqueeze(0)
    mask = torch.zeros(1, 1, 11, 11, dtype=torch.bool)
    mask[:, :, 5:, :5] = True
    changed = ids.clone()
    changed[:, :5] = (changed[:, :5] + 1) % VOCAB
    context = ForwardContext(rng=SampleRng(3, (0,)))
    with torch.set_grad_enabled(grad):
        before = model(ids, positions, mask, context=context)
        after = model(changed, positions, mask, context=context)
        unmasked = model(ids, positions, context=context)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], unmasked[:, 5:]).all()


def test_document_after_another_equals_the_document_alone() -> None:
    model = tiny_gpt(tiny_config(position_embedding_type="rope"))
    ids, _, _ = tiny_batch(samples=1, length=11)
    mask = torch.zeros(1, 1, 11, 11, dtype=torch.bool)
    mask[:, :, 5:, :5] = True
    positions = torch.cat([torch.arange(5), torch.arange(6)]).unsqueeze(0)
    alone = model(ids[:, 5:], positions[:, 5:])
    together = model(ids, positions, mask)[:, 5:]
    torch.testing.assert_close(together, alone, **TOLERANCES[torch.float64])


def test_evaluation_and_training_attention_agree_without_dropout() -> None:
    model = tiny_gpt(tiny_config(hidden_dropout=0.5, attention_dropout=0.5))
    ids, positions, labels = tiny_batch()
    training = model(ids, positions, labels=labels)
    with torch.no_grad():
        evaluation = model(ids, positions, labels=labels)
    torch.testing.assert_close(training.detach(), evaluation, **TOLERANCES[torch.float64])


def test_a_sample_is_dropped_alike_in_whichever_batch_it_is() -> None:
    model = tiny_gpt(tiny_config(hidden_dropout=0.2, attention_dropout=0.3))
    ids, positions, labels = tiny_batch(samples=3)

    def losses(samples: list[int], numbers: tuple[int, ...]) -> torch.Tensor:
        context = ForwardContext(rng=SampleRng(5, numbers))
        return model(ids[samples], positions[samples], labels=labels[samples], context=context)

    together = losses([0, 1, 2], (70, 71, 72))
    for split in (losses([2, 0], (72, 70))[[1, 0]], losses([0, 2], (70, 72))):
        torch.testing.assert_close(split, together[[0, 2]], **TOLERANCES[torch.float64])
    other_number = losses([0], (73,))
    assert not torch.isclose(other_number, together[:1]).any()


def test_recomputed_forward_drops_the_same_elements() -> None:
    model = tiny_gpt(tiny_config(hidden_dropout=0.2, attention_dropout=0.3))
    ids, positions, labels = tiny_batch()
    context = ForwardContext(rng=SampleRng(5, (0, 1)))
    first, second = (model(ids, positions, labels=labels, context=context) for _ in range(2))
    assert torch.equal(first, second)


def test_training_forward_and_backward_use_no_global_random_numbers() -> None:
    model = tiny_gpt(tiny_config(hidden_dropout=0.2, attention_dropout=0.3))
    ids, positions, labels = tiny_batch()
    state = torch.get_rng_state()
    context = ForwardContext(rng=SampleRng(5, (0, 1)))
    model(ids, positions, labels=labels, context=context).sum().backward()
    assert torch.equal(state, torch.get_rng_state())


def test_tied_output_has_no_weight_of_its_own() -> None:
    tied = tiny_gpt(tiny_config())
    untied = tiny_gpt(tiny_config(untie_embeddings_and_output_weights=True))
    names = {name for name, _ in untied.named_parameters()}
    assert names - {name for name, _ in tied.named_parameters()} == {"output_layer.weight"}


def test_parameter_names_are_the_documented_ones() -> None:
    config = tiny_config(num_layers=1, untie_embeddings_and_output_weights=True)
    layer = "decoder.layers.0."
    pairs = [
        f"{layer}input_layernorm",
        f"{layer}self_attention.linear_qkv",
        f"{layer}self_attention.linear_proj",
        f"{layer}pre_mlp_layernorm",
        f"{layer}mlp.linear_fc1",
        f"{layer}mlp.linear_fc2",
        "decoder.final_layernorm",
    ]
    expected = {f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias")}
    expected |= {
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "output_layer.weight",
    }
    assert {name for name, _ in tiny_gpt(config).named_parameters()} == expected


def test_sequence_beyond_the_position_table_is_refused_by_name() -> None:
    model = tiny_gpt(tiny_config())
    ids, positions, _ = tiny_batch(length=MAX_LENGTH + 1)
    with pytest.raises(ConfigError, match=f"25 tokens .*--max-position-embeddings {MAX_LENGTH}"):
        model(ids, positions)


def test_bf16_model_is_near_its_fp32_twin_and_gives_fp32_losses() -> None:
    options = {**SHAPES["rope, RMSNorm, swiglu, grouped, untied"], "fp64": False}
    ids, positions, labels = tiny_batch()
    exact = tiny_gpt(tiny_config(**options), spread=3.0)
    rounded = tiny_gpt(tiny_config(**options, bf16=True), spread=3.0)
    loss = rounded(ids, positions, labels=labels)
    loss.mean().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact(ids, positions, labels=labels), rtol=0, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rounded.parameters())


def test_every_place_that_drops_draws_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[object, object]] = []
    draw = SampleRng.kept

    def recorded(self: SampleRng, *args: object, **place: object) -> torch.Tensor:
        places.append((place["layer"], place["site"]))
        return draw(self, *args, **place)

    monkeypatch.setattr(SampleRng, "kept", recorded)
    model = tiny_gpt(tiny_config(hidden_dropout=0.2, attention_dropout=0.3))
    ids, positions, _ = tiny_batch()
    model(ids, positions, context=ForwardContext(rng=SampleRng(5, (0, 1))))
    assert len(places) == 1 + 2 * (4 + 2)  # embedding; in each layer 4 heads, attention, MLP
    assert len(set(places)) == len(places)
