"""Every flag of multi-head latent attention changes the model or its cache."""

from dataclasses import fields

import pytest
import torch

from megatron.core.inference.generate import make_cache
from megatron.core.transformer.config.attention import AttentionConfig
from megatron.core.transformer.config.mla import MLAConfig
from megatron.core.transformer.config.rotary import RotaryConfig
from megatron.training.arguments import parse_args
from tests.helpers.models import tiny_batch, tiny_gpt

MODEL = "--mock-data --num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --fp64"
ROPE = "--position-embedding-type rope"
MLA = "--multi-latent-attention"
CASES: dict[str, tuple[str, str]] = {  # flag -> what both command lines have, and the second
    "--multi-latent-attention": (ROPE, MLA),
    "--q-lora-rank": (MLA, "--q-lora-rank 8"),
    "--kv-lora-rank": (MLA, "--kv-lora-rank 8"),
    "--qk-head-dim": (MLA, "--qk-head-dim 8"),
    "--qk-pos-emb-head-dim": (MLA, "--qk-pos-emb-head-dim 8"),
    "--v-head-dim": (MLA, "--v-head-dim 8"),
    "--cache-mla-latents": (MLA, "--cache-mla-latents"),
    "--rotary-scaling-factor": (f"{MLA} --rotary-base 50", "--rotary-scaling-factor 4"),
}


def _seen(line: str) -> tuple[list[tuple[str, torch.Size]], torch.Size, torch.Tensor]:
    """Return names and shapes of weights, the shape of cached keys, and logits of a few tokens."""
    config = parse_args(f"{MODEL} {line}".split(), world_size=1).model
    config.hidden_dropout = config.attention_dropout = 0.0
    model = tiny_gpt(config)
    ids, positions, _ = tiny_batch(samples=1, length=12)
    shapes = [(name, param.shape) for name, param in model.named_parameters()]
    return shapes, make_cache(config, 1, 4).keys.shape, model(ids, positions).detach()


def test_every_option_has_a_case() -> None:
    inherited = {f.name for f in (*fields(AttentionConfig), *fields(RotaryConfig))}
    own = {f.name for f in fields(MLAConfig)} - inherited
    assert {f"--{name.replace('_', '-')}" for name in own} | {"--rotary-scaling-factor"} == set(
        CASES
    )


@pytest.mark.parametrize("flag", CASES)
def test_the_flag_changes_something(flag: str) -> None:
    both, second = CASES[flag]
    without, again, with_it = _seen(both), _seen(both), _seen(f"{both} {second}")
    assert without[:2] == again[:2]
    assert torch.equal(without[2], again[2])
    assert without[:2] != with_it[:2] or not torch.equal(without[2], with_it[2])
