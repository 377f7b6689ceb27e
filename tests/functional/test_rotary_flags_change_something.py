"""Every flag of positions, norms of queries and keys and projection biases changes the model."""

import re
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch

from megatron.core.param_role import role_of
from megatron.core.transformer.config.rotary import RotaryConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import parse_args
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig
from tests.helpers.models import tiny_batch, tiny_gpt

MODEL = "--mock-data --num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --fp64"
ROPE = "--position-embedding-type rope"
# few channels and short sequences: bases and lengths are small, or stretching would not be seen
YARN = (
    "--position-embedding-type yarn --rope-scaling-factor 4 --rotary-base 50 --yarn-beta-slow 0.01 "
    "--rope-scaling-original-max-position-embeddings 32 --yarn-beta-fast 3"
)
LLAMA = f"{ROPE} --use-rope-scaling --rope-scaling-original-max-position-embeddings 32"
LONG = (
    f"{ROPE} --rope-scaling-type longrope --rope-scaling-original-max-position-embeddings %d "
    "--rope-scaling-factor 2"
)
SHORT_FACTOR, LONG_FACTOR = "--longrope-short-factor 1 1 2 3", "--longrope-long-factor 2 3 4 5"
NORM = "--qk-layernorm --normalization RMSNorm"


class Case(NamedTuple):
    """Two command lines that differ in one flag."""

    both: str
    first: str
    second: str


CASES: dict[str, Case] = {
    "--position-embedding-type": Case("", "", ROPE),
    "--max-position-embeddings": Case(
        f"{ROPE} --rope-scaling-type longrope --rope-scaling-original-max-position-embeddings 16 "
        f"{SHORT_FACTOR} {LONG_FACTOR}",
        *("--max-position-embeddings 32", "--max-position-embeddings 64"),
    ),
    "--rotary-base": Case(ROPE, "", "--rotary-base 500.5"),
    "--rotary-percent": Case(ROPE, "", "--rotary-percent 0.5"),
    "--rotary-interleaved": Case(ROPE, "", "--rotary-interleaved"),
    "--rotary-seq-len-interpolation-factor": Case(
        ROPE, "", "--rotary-seq-len-interpolation-factor 4"
    ),
    "--use-rope-scaling": Case(
        f"{ROPE} --rotary-base 1e6", "", "--use-rope-scaling --rope-scaling-factor 64"
    ),
    "--rope-type": Case(ROPE, "", "--rope-type yarn --rope-scaling-factor 4"),
    "--rope-scaling-type": Case(
        f"{ROPE} --rope-scaling-factor 4", "--rope-scaling-type ntk", "--rope-scaling-type linear"
    ),
    "--rope-scaling-factor": Case(LLAMA, "", "--rope-scaling-factor 4"),
    "--rope-scaling-original-max-position-embeddings": Case(
        f"{ROPE} --use-rope-scaling", "", "--rope-scaling-original-max-position-embeddings 32"
    ),
    "--rope-scaling-low-freq-factor": Case(LLAMA, "", "--rope-scaling-low-freq-factor 0.1"),
    "--rope-scaling-high-freq-factor": Case(LLAMA, "", "--rope-scaling-high-freq-factor 9"),
    "--rope-attention-factor": Case(YARN, "", "--rope-attention-factor 2"),
    "--yarn-beta-fast": Case(YARN, "", "--yarn-beta-fast 1"),
    "--yarn-beta-slow": Case(YARN, "", "--yarn-beta-slow 1.5"),
    "--no-yarn-correction-range-round-to-int": Case(
        YARN, "", "--no-yarn-correction-range-round-to-int"
    ),
    "--mscale": Case(f"{YARN} --mscale-all-dim 1", "", "--mscale 0.5"),
    "--mscale-all-dim": Case(YARN, "", "--mscale-all-dim 0.5"),
    "--longrope-short-factor": Case(
        f"{LONG % 32} {LONG_FACTOR}", SHORT_FACTOR, "--longrope-short-factor 1 1 2 4"
    ),
    "--longrope-long-factor": Case(
        f"{LONG % 8} {SHORT_FACTOR}", LONG_FACTOR, "--longrope-long-factor 2 3 4 6"
    ),
    "--qk-layernorm": Case("--normalization RMSNorm", "", "--qk-layernorm"),
    "--qk-layernorm-scope": Case(NORM, "", "--qk-layernorm-scope all_heads"),
    "--apply-wd-to-qk-layernorm": Case(NORM, "", "--apply-wd-to-qk-layernorm"),
    "--add-proj-bias": Case("--disable-bias-linear", "", "--add-proj-bias"),
}
FIELDS = {field.name for field in fields(RotaryConfig)} | {
    *("qk_layernorm", "qk_layernorm_scope", "apply_wd_to_qk_layernorm", "add_proj_bias")
}


def _seen(line: str) -> tuple[list[str], torch.Tensor]:
    """Return the weights that decay, by name, and logits of a few tokens."""
    config: TransformerConfig = parse_args(f"{MODEL} {line}".split(), world_size=1).model
    config.hidden_dropout = config.attention_dropout = 0.0
    model = tiny_gpt(config)
    ids, positions, _ = tiny_batch(samples=1, length=12)
    decaying = [name for name, param in model.named_parameters() if role_of(param).decays]
    return decaying, model(ids, positions).detach()


def test_every_option_has_a_case():
    options = options_of(RunConfig)
    assert {options[name].flag for name in FIELDS} == set(CASES)


@pytest.mark.parametrize("flag", CASES)
def test_the_flag_changes_something(flag):
    case = CASES[flag]
    assert re.search(rf"{flag}( |$)", case.second), "the case is about another flag"
    before, after = (_seen(f"{case.both} {line}") for line in (case.first, case.second))
    assert before[0] != after[0] or (before[1] - after[1]).abs().max() > 1e-9


def test_megatrons_flags_are_other_ways_to_say_the_same():
    for one, other in (
        ("--use-rope-scaling", "--rope-scaling-type llama3 --rotary-scaling-factor 8"),
        (
            "--rotary-seq-len-interpolation-factor 3",
            "--rope-scaling-type linear --rope-scaling-factor 3",
        ),
        (
            "--rope-type yarn --rope-scaling-factor 3 --yarn-original-max-position-embeddings 64",
            "--rope-scaling-type yarn --rope-scaling-factor 3 "
            "--rope-scaling-original-max-position-embeddings 64 --yarn-beta-fast 32",
        ),
    ):
        assert torch.equal(_seen(f"{ROPE} {one}")[1], _seen(f"{ROPE} {other}")[1])
