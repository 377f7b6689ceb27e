"""Every example: its YAML is its script, its toy has its features, its flags are valid together."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from megatron.training.arguments import parse_args
from tools.recipes.compare import difference, is_equal
from tools.recipes.published import PUBLISHED
from tools.recipes.runs import Plan, script_of
from tools.recipes.table import counted, problems_of

ROOT = Path(__file__).parents[2]
NAMES = [one.example for one in PUBLISHED]
# what makes a family what it is, whatever the size
KEPT_BY_A_TOY = [
    "multi_latent_attention",
    "qk_layernorm",
    "qk_layernorm_scope",
    "add_qkv_bias",
    "softmax_type",
    "swiglu",
    "geglu",
    "quick_geglu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "attn_logit_softcapping",
    "sandwich_norm",
    "moe_router_bias",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "mtp_num_layers",
    "rope_scaling_type",
    "use_rope_scaling",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_gate",
    "normalization",
    "add_bias_linear",
    "embedding_multiplier",
    "logits_multiplier",
    "group_query_attention",
    "moe_router_load_balancing_type",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a torchrun and a python that print what they were given."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("torchrun", "python"):
        program = folder / name
        program.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
        program.chmod(0o755)
    return folder


def _flags(example: str, said: Path, *words: str) -> list[str]:
    result = subprocess.run(
        ["bash", str(script_of(example)), *words],
        capture_output=True,
        text=True,
        env={"PATH": f"{said}{os.pathsep}/usr/bin{os.pathsep}/bin"},
    )
    assert result.returncode == 0, result.stderr
    given = result.stdout.splitlines()
    return given[given.index("pretrain_gpt.py") + 1 :]


def _yaml(example: str, suffix: str = "") -> str:
    return str(ROOT / "examples" / f"{example}{suffix}.yaml")


def _resolved(flags: list[str], ranks: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    return dataclasses.asdict(parse_args(flags))


def test_every_script_is_in_the_list() -> None:
    scripts = {f"{p.parent.name}/{p.stem[6:]}" for p in ROOT.glob("examples/*/train_*.sh")}
    assert scripts - {"tiny/2_ranks_cpu"} == set(NAMES)


@pytest.mark.parametrize("example", NAMES)
def test_the_yaml_is_the_script(example, said, monkeypatch) -> None:
    ranks = int(
        next(
            line.partition("=")[2]
            for line in script_of(example).read_text().splitlines()
            if line.startswith("GPUS=")
        )
    )
    data = ["--mock-data", "--vocab-size", "256"]
    by_script = _resolved(_flags(example, said, *data), ranks, monkeypatch)
    by_yaml = _resolved(["--yaml-cfg", _yaml(example), *data], ranks, monkeypatch)
    _same(by_script, by_yaml)
    toy = _resolved(_flags(example, said, "--toy"), 2, monkeypatch)
    _same(toy, _resolved(["--yaml-cfg", _yaml(example, "_toy")], 2, monkeypatch))
    assert toy["training"]["train_iters"] == 30
    for name in KEPT_BY_A_TOY:
        assert toy["model"][name] == by_script["model"][name], name


def _same(one: dict, other: dict) -> None:
    for section in one:
        if section in ("sources", "notices"):
            continue
        wrong = {
            name: (value, other[section][name])
            for name, value in (one[section].items() if isinstance(one[section], dict) else ())
            if value != other[section][name] and name != "yaml_cfg"
        }
        assert not wrong, (section, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("example", NAMES)
def test_a_toy_trains_on_two_ranks(example) -> None:
    from tools.recipes.runs import toy

    run = toy(example)
    assert run.steps == 30
    assert run.last_loss < run.first_loss - 0.5


def test_a_figure_is_equal_within_one_percent_or_by_its_digits() -> None:
    assert is_equal("46.7", 46_702_792_704)
    assert is_equal("1.3", 1_282_000_000), "1.3 may be 1.25 to 1.35"
    assert is_equal("2.4", 2_451_440_640), "digits were left out"
    assert not is_equal("2.4", 2_501_000_000)
    assert not is_equal("1.3", 1_249_000_000)
    assert not is_equal("46.7", 47_200_000_000)
    assert not is_equal("20.91", 21_200_000_000)
    assert difference("100", 99 * 10**9) == pytest.approx(-0.01)


def test_a_wrong_plan_is_told() -> None:
    published = next(one for one in PUBLISHED if one.example == "deepseek/v3")
    plan = Plan(
        world_size=1,
        total=685 * 10**9,
        active=38 * 10**9,
        embedding=0,
        mtp=(14 * 10**9, 10**9),
        layout="",
        gib=1.0,
        deadlock=None,
        seconds=1.0,
    )
    assert counted(published, plan) == (671 * 10**9, 37 * 10**9)
    assert problems_of(published, plan) == []
    wrong = plan._replace(total=700 * 10**9, active=60 * 10**9, deadlock=["rank 3 waits"])
    found = problems_of(published, wrong)
    assert len(found) == 3
    assert "published 671 B" in found[0]
    assert "rank 3 waits" in found[2]
