"""Every flag of the core of attention changes what is trained; none parses and does nothing."""

from dataclasses import fields

import pytest

from megatron.core.transformer.config.core_attention import CoreAttentionConfig
from tests.functional.moe_flags import Case, built, trained
from tests.helpers.ranks import run_ranks

WINDOW = "--window-size 2,0"
CASES = {
    "--softmax-scale": Case(trained, "", "--softmax-scale 1.5"),
    "--window-size": Case(trained, "", WINDOW),
    "--window-attn-skip-freq": Case(trained, WINDOW, "--window-attn-skip-freq 2"),
    "--softmax-type": Case(built, "", "--softmax-type learnable"),
    "--softmax-type off-by-one": Case(trained, "", "--softmax-type off-by-one"),
    "--attn-logit-softcapping": Case(trained, "", "--attn-logit-softcapping 0.1"),
}


def test_every_flag_has_a_case() -> None:
    flags = {f"--{field.name.replace('_', '-')}" for field in fields(CoreAttentionConfig)}
    assert {flag.split()[0] for flag in CASES} == flags


def _differs(flag: str, case: Case) -> None:
    assert case.observe(f"{case.both} {case.second}") != case.observe(case.both), flag


@pytest.mark.parametrize("flag", CASES)
def test_the_flag_changes_something(flag: str) -> None:
    run_ranks(_differs, 1, flag, CASES[flag])


def _repeats() -> None:
    assert trained(WINDOW) == trained(WINDOW)


def test_the_same_flags_show_no_difference() -> None:
    run_ranks(_repeats, 1)
