"""Initial weights: the same for every split of the experts, and as large as documented."""

import math

import pytest
import torch
from torch import nn

from megatron.core.param_role import Init, ParamRole, role_of, set_role
from megatron.core.tensor_parallel.weight_init import init_weights, tensor_hashes
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.models import MAX_LENGTH, VOCAB, tiny_config, tiny_gpt


class _Bank(nn.Module):
    """Experts stacked in one parameter, as ``GroupedMLP`` holds them."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        super().__init__()
        role = ParamRole(
            init=Init(std=0.5),
            is_expert=True,
            expert_ids=experts,
            expert_name="linear_fc1.weight",
        )
        self.weight1 = set_role(nn.Parameter(torch.empty(len(experts), 6, 4)), role)


def _bank(*experts: int) -> _Bank:
    bank = _Bank(experts)
    init_weights(bank, seed=3)
    return bank


def test_each_expert_is_the_same_however_the_experts_are_spread() -> None:
    whole = tensor_hashes(_bank(0, 1, 2, 3))
    assert whole == tensor_hashes(_bank(0, 1)) | tensor_hashes(_bank(2, 3))
    assert whole == tensor_hashes(_bank(3, 2)) | tensor_hashes(_bank(1, 0))


def test_no_two_experts_are_equal() -> None:
    hashes = tensor_hashes(_bank(*range(16)))
    assert len(set(hashes.values())) == 16


def test_hashes_of_a_model_see_seed_and_a_single_changed_bit() -> None:
    config = tiny_config()
    model = tiny_gpt(config)
    init_weights(model, 5)
    before = tensor_hashes(model)
    init_weights(model, 6)
    assert tensor_hashes(model) != before
    init_weights(model, 5)
    assert tensor_hashes(model) == before
    with torch.no_grad():
        model.decoder.layers["0"].mlp.linear_fc1.bias[0] = -0.0
    assert tensor_hashes(model) != before


def _std_of(name: str, config: TransformerConfig) -> float:
    model = tiny_gpt(config)
    init_weights(model, 1)
    return dict(model.named_parameters())[name].std().item()


@pytest.mark.parametrize(
    ("name", "divisor"),
    [
        ("embedding.word_embeddings.weight", 1.0),
        ("embedding.position_embeddings.weight", 1.0),
        ("output_layer.weight", 1.0),
        ("decoder.layers.1.self_attention.linear_qkv.weight", 1.0),
        ("decoder.layers.1.mlp.linear_fc1.weight", 1.0),
        ("decoder.layers.1.self_attention.linear_proj.weight", math.sqrt(2 * 3)),
        ("decoder.layers.1.mlp.linear_fc2.weight", math.sqrt(2 * 3)),
    ],
)
def test_spread_of_initial_weights_is_the_documented_one(name: str, divisor: float) -> None:
    config = tiny_config(
        num_layers=3,
        hidden_size=256,
        init_method_std=0.03,
        untie_embeddings_and_output_weights=True,
    )
    assert _std_of(name, config) == pytest.approx(0.03 / divisor, rel=0.05)


def test_biases_start_at_zero_norms_at_one_and_neither_decays() -> None:
    model = tiny_gpt(tiny_config())
    init_weights(model, 1)
    for name, param in model.named_parameters():
        assert role_of(param).decays == (param.dim() > 1), name
        if name.endswith("bias"):
            assert not param.any(), name
        elif param.dim() == 1:
            assert bool((param == 1).all()), name


def test_weights_of_another_dtype_are_the_same_draw_rounded() -> None:
    single, half = tiny_gpt(tiny_config(fp64=False)), tiny_gpt(tiny_config(fp64=False, bf16=True))
    for model in (single, half):
        init_weights(model, 1)
    for wide, narrow in zip(single.parameters(), half.parameters(), strict=True):
        assert torch.equal(wide.bfloat16(), narrow)


def test_initialisation_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    tiny_gpt(tiny_config())
    assert torch.equal(state, torch.get_rng_state())


def test_table_sizes_follow_the_arguments() -> None:
    embedding = tiny_gpt(tiny_config()).embedding
    assert embedding.word_embeddings.weight.shape == (VOCAB, 32)
    assert embedding.position_embeddings.weight.shape == (MAX_LENGTH, 32)
