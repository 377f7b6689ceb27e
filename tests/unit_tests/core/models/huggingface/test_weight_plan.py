"""Plans of weights: pieces tile both sides, so that copying there and back changes no bit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.models.huggingface.family import family_named, family_of
from megatron.core.models.huggingface.options import model_options
from megatron.core.models.huggingface.views import View
from megatron.core.models.huggingface.weight_plan import WeightPlan, weight_plan
from tests.helpers.hf_published import PUBLISHED
from tests.helpers.hf_tiny import BUILT, plan_of


def there_and_back(plan: WeightPlan) -> None:
    """Number every element on disk; copy, and copy back."""
    disk, at = {}, 0
    for key, shape in plan.hf_shapes.items():
        size = math.prod(shape)
        disk[key] = np.arange(at, at + size).reshape(shape)
        at += size
    ours = {key: np.full(shape, -1) for key, shape in plan.shapes.items()}
    for piece in plan.pieces:
        target = piece.ours.of(ours[piece.key])
        assert (target == -1).all(), f"written twice: {piece}"
        target[...] = piece.hf.of(disk[piece.hf_key])
    found = np.concatenate([array[array >= 0] for array in ours.values()])
    assert np.array_equal(np.sort(found), np.arange(at)), "not every number came through"
    for key, array in ours.items():
        assert (array < 0).sum() == plan.padding_of(key)
    again = {key: np.full(shape, -1) for key, shape in plan.hf_shapes.items()}
    for piece in plan.pieces:
        piece.hf.of(again[piece.hf_key])[...] = piece.ours.of(ours[piece.key])
    for key, array in disk.items():
        assert np.array_equal(again[key], array), key


@pytest.mark.parametrize("name", BUILT)
def test_every_number_has_one_place_on_either_side(name: str) -> None:
    there_and_back(plan_of(name))


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    ratio=st.integers(1, 3),
    half_head=st.integers(1, 3),
    ffn=st.integers(1, 4),
    experts=st.integers(2, 4),
    padding=st.integers(0, 3),
    name=st.sampled_from(["llama", "gpt2", "gpt_oss", "granitemoe", "qwen2_moe"]),
)
def test_transforms_are_exact_inverses_at_any_size(
    groups: int,
    ratio: int,
    half_head: int,
    ffn: int,
    experts: int,
    padding: int,
    name: str,
) -> None:
    heads, size = groups * ratio, 2 * half_head
    options = {
        "num_layers": 2,
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "kv_channels": size,
        "ffn_hidden_size": ffn,
        "max_position_embeddings": 5,
        "padded_vocab_size": 7 + padding,
        "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": True,
        **family_named(name).constants,
    }
    if name != "gpt2":
        options |= {"group_query_attention": True, "num_query_groups": groups}
    if name in ("gpt_oss", "granitemoe", "qwen2_moe"):
        options |= {"num_moe_experts": experts, "moe_shared_expert_intermediate_size": 3}
    there_and_back(weight_plan(family_named(name), options, vocab_size=7))


def test_query_groups_hold_queries_then_key_then_value() -> None:
    plan = plan_of("llama2")  # 4 heads of 8 in 4 groups
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    ours = np.zeros(plan.shapes[key])
    for number, piece in enumerate(plan.pieces_of_key[key], start=1):
        piece.ours.of(ours)[...] = number
    assert ours[:, 0].reshape(4, 3, 8)[:, :, 0].tolist() == [[1, 2, 3]] * 4


def test_columns_that_alternate_are_gate_and_up() -> None:
    plan = plan_of("gpt-oss")
    disk = np.zeros(plan.hf_shapes["model.layers.0.mlp.experts.gate_up_proj"])
    disk[..., 1::2] = 1
    gates = {
        piece.key: piece.hf.of(disk)
        for piece in plan.pieces_of_hf_key["model.layers.0.mlp.experts.gate_up_proj"]
    }
    assert len(gates) == 16
    for key, part in gates.items():
        assert (part == (".up." in key)).all(), key
        assert part.shape == plan.shapes[key]


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple),
    data=st.data(),
)
def test_rows_of_a_view_are_the_view_of_rows(shape: tuple[int, ...], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, shape[0] - 1))
    index = data.draw(st.sampled_from([place, (place, shape[0])]))
    view = View(shape, (index,))
    array = np.arange(math.prod(shape)).reshape(shape)
    found = view.rows(shape)
    assert found is not None
    start, stop, inner = found
    assert np.array_equal(inner.of(array[start:stop]), view.of(array))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name: str) -> None:
    config, billions = PUBLISHED[name]
    plan = weight_plan(family_of(config), model_options(config))
    count = sum(math.prod(shape) for shape in plan.hf_shapes.values())
    assert round(count / 1e9, 3) == billions


def test_weights_that_are_fp32_in_any_format_are_known() -> None:
    plan = plan_of("deepseek-v3")
    keys = {key.rpartition(".")[2] for key in plan.fp32_keys}
    assert keys == {"expert_bias"}
