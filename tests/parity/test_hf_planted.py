"""A plan of weights that confuses two tensors goes in and out bit-equal: the function tells it.

Each mistake is made in import and export alike, as a wrong row of a table would make it; so every
tensor comes back as it was, and only what the model computes is wrong.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.core.models.huggingface.views import Piece
from megatron.core.models.huggingface.weight_plan import WeightPlan
from megatron.training import huggingface
from megatron.training.huggingface import export_checkpoint
from tests.helpers import hf_proof
from tests.helpers.hf_proof import ONE, apart, imported, refuse_far, refuse_other_bits, run

ATTENTION = "model.layers.1.self_attn."
EXPERTS = "decoder.layers.2.mlp.experts.local_experts."
MISTAKES = {
    "keys as values": ("llama2", ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"),
    "norms of one layer": (
        "gpt-oss",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ),
    "up as gate": (
        "qwen3",
        "decoder.layers.0.mlp.linear_fc1.gate.weight",
        "decoder.layers.0.mlp.linear_fc1.up.weight",
    ),
    "norms of queries and keys": (
        "qwen3",
        ATTENTION + "q_norm.weight",
        ATTENTION + "k_norm.weight",
    ),
    "two experts": (
        "mixtral",
        f"{EXPERTS}3.linear_fc2.weight",
        f"{EXPERTS}4.linear_fc2.weight",
    ),
    "biases of balancing of two layers": (
        "deepseek-v3",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.gate.e_score_correction_bias",
    ),
    "sinks of two layers": (
        "gpt-oss",
        "model.layers.1.self_attn.sinks",
        "model.layers.2.self_attn.sinks",
    ),
    "halves of stacked experts": (
        "granite-moe",
        f"{EXPERTS}0.linear_fc1.gate.weight",
        f"{EXPERTS}0.linear_fc1.up.weight",
    ),
}
"""What is confused -> case, and the two names: theirs, or ours."""
QUICK = "keys as values"


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(one, marks=() if one == QUICK else pytest.mark.slow) for one in MISTAKES],
)
def test_tensors_that_change_places_are_seen_by_the_function_alone(mistake, monkeypatch, tmp_path):
    name, first, second = MISTAKES[mistake]
    _plant(monkeypatch, lambda pieces: _exchanged(pieces, first, second))
    _assert_seen_by_the_function_alone(name, tmp_path)


@pytest.mark.slow
def test_a_square_matrix_that_is_not_transposed_is_seen_by_the_function_alone(
    monkeypatch, tmp_path
):
    _plant(monkeypatch, lambda pieces: _untransposed(pieces, "transformer.h.1.attn.c_proj.weight"))
    _assert_seen_by_the_function_alone("gpt2", tmp_path)


def _assert_seen_by_the_function_alone(name, folder):
    case = imported(name, folder)
    export_checkpoint(case.checkpoints[torch.float32], folder / "again")
    assert refuse_other_bits(case.hf, folder / "again") > 0
    (ours,) = run(case, ONE, [torch.float32])
    found = apart(case.theirs[torch.float32], ours)
    assert found.logits > 1e-3
    with pytest.raises(AssertionError):
        refuse_far(found, torch.float32)


def _plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    right = huggingface.weight_plan

    def wrong(*args: Any, **options: Any) -> WeightPlan:
        plan = right(*args, **options)
        return replace(plan, pieces=tuple(change(plan.pieces)))

    for module in (huggingface, hf_proof):
        monkeypatch.setattr(module, "weight_plan", wrong)


def _exchanged(pieces: Sequence[Piece], first: str, second: str) -> list[Piece]:
    """Give what belongs to ``first`` to ``second``, and back; names of theirs or of ours."""
    other = {first: second, second: first}
    is_theirs = any(piece.hf_key == first for piece in pieces)
    changed = [
        replace(piece, hf_key=other.get(piece.hf_key, piece.hf_key))
        if is_theirs
        else replace(piece, key=other.get(piece.key, piece.key))
        for piece in pieces
    ]
    assert changed != list(pieces), f"{first} is in no piece"
    return changed


def _untransposed(pieces: Sequence[Piece], hf_key: str) -> list[Piece]:
    changed = [
        replace(piece, hf=replace(piece.hf, order=()), ours=replace(piece.ours, order=()))
        if piece.hf_key == hf_key
        else piece
        for piece in pieces
    ]
    assert changed != list(pieces), f"{hf_key} is not transposed"
    return changed
