"""Command line, plans and refusals of surgery; what it does to a model is in tests/parity."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.router_trace_files import (
    StepTrace,
    TraceIndex,
    rank_folder,
    start_name,
    write_index,
    write_step,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from tools.checkpoint import expert_edit, expert_plans, expert_rules, experts
from tools.checkpoint.expert_plans import NewExpert, kept


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 uses experts 0 to 2, layer 2 uses 1 and 3, of 4 each; step 2 uses all."""
    folder = tmp_path_factory.mktemp("trace")
    start = folder / start_name(1, 0)
    index = TraceIndex(
        first_step=0, world_size=1, moe_layers=[1, 2], num_experts=[4, 4], topk=[2, 2]
    )
    write_index(start, index)
    rank_folder(start, 0).mkdir()
    tokens = np.arange(12).reshape(2, 6)
    used = {
        1: {1: [0, 1, 2, 1, 2, 2], 2: [1, 3, 3, 3, 1, 3]},
        2: {1: [3] * 6, 2: [0, 2, 0, 2, 0, 2]},
    }
    for step, layers in used.items():
        chosen = {
            layer: np.stack([np.array([row, row]), np.full((2, 6), 255)], axis=2).astype(np.uint8)
            for layer, row in layers.items()
        }
        weights = {layer: np.ones(ids.shape, np.float16) for layer, ids in chosen.items()}
        part = StepTrace(
            np.arange(2), tokens.astype(np.uint16), np.zeros((2, 6), np.bool_), chosen, weights
        )
        write_step(rank_folder(start, 0), step, part)
    return folder


def experts_in(folder: Path) -> list[int]:
    by_layer = StoredCheckpoint.open(folder).common["architecture"]["--moe-num-experts-per-layer"]
    return by_layer or [StoredCheckpoint.open(folder).common["architecture"]["--num-experts"]]


@pytest.mark.parametrize(
    ("words", "lines", "numbers"),
    [
        (["--keep", "1-3"], ["4 experts -> 3: 1, 2, 3", "4 experts -> 3: 1, 2, 3"], [3]),
        (["--drop", "0", "--layers", "2"], ["layer 2: 4 experts -> 3: 1, 2, 3"], [0, 4, 3]),
        (["--keep", "0,1", "--keep", "2:1-3"], ["> 2: 0, 1", "> 3: 1, 2, 3"], [0, 2, 3]),
        (["--unused-in", "TRACE", "--last-step", 1], ["> 3: 0, 1, 2", "> 2: 1, 3"], [0, 3, 2]),
        (["--unused-in", "TRACE", "--last-step", 1, "--multiple-of", 2], ["> 2: 1, 3"], [0, 4, 2]),
        (["--unused-in", "TRACE"], ["4 experts -> 4"], [4]),
        (["--keep-top", 2, "--tokens-in", "TRACE"], ["layer 1: 4 experts -> 2: 2, 3"], [2]),
    ],
)
def test_prune_keeps_what_was_asked(
    run_folder, trace, tmp_path, call, words, lines, numbers
) -> None:
    words = [trace if word == "TRACE" else word for word in words]
    call_words = ("prune", "--load", run_folder, "--save", tmp_path, *words)
    code, text, errors = call(experts.main, *call_words)
    assert (code, errors) == (0, "")
    assert all(line in text for line in lines), text
    assert experts_in(tmp_path) == numbers
    history = StoredCheckpoint.open(tmp_path).common["history"]
    assert history[0].startswith("experts prune --load")


def test_merge_weighs_by_the_tokens_of_a_trace(run_folder, trace, tmp_path, call) -> None:
    words = ("--groups", "1:0,2", "--tokens-in", trace, "--last-step", 1, "--no-optim")
    code, text, _ = call(experts.main, "merge", "--load", run_folder, "--save", tmp_path, *words)
    assert code == 0
    assert "layer 1: 4 experts -> 3: 0.25x0+0.75x2, 1, 3" in text
    assert "--no-load-optim" in text
    new, old = StoredCheckpoint.open(tmp_path), StoredCheckpoint.open(run_folder)
    for name in ("linear_fc1.up.weight", "linear_fc2.weight"):
        key = "model.decoder.layers.1.mlp.experts.local_experts.{}." + name
        mean = 0.25 * old.read(key.format(0)).double() + 0.75 * old.read(key.format(2)).double()
        assert torch.equal(new.read(key.format(0)), mean.float())
        assert torch.equal(new.read(key.format(2)), old.read(key.format(3)))
        assert key.format(3) not in new.index
    for name in ("weight", "expert_bias"):
        key = f"model.decoder.layers.1.mlp.router.{name}"
        rows = old.read(key).double()
        expected = torch.stack([0.25 * rows[0] + 0.75 * rows[2], rows[1], rows[3]])
        assert torch.equal(new.read(key), expected.float())


def test_noise_moves_copies_alone_and_always_alike(run_folder, tmp_path, call) -> None:
    for name in ("a", "b"):
        words = ("clone", "--load", run_folder, "--save", tmp_path / name, "--noise", 0.1)
        assert call(experts.main, *words)[0] == 0
    one, two = (StoredCheckpoint.open(tmp_path / name) for name in ("a", "b"))
    old = StoredCheckpoint.open(run_folder)
    key = "model.decoder.layers.2.mlp.experts.local_experts.{}.linear_fc2.weight"
    assert torch.equal(one.read(key.format(2)), old.read(key.format(1)))
    ratio = one.read(key.format(3)) / old.read(key.format(1)) - 1
    assert 0.05 < ratio.std() < 0.2
    assert all(one.block_hashes(k) == two.block_hashes(k) for k in one.keys)
    moment = key.format(3).replace("model.", "optimizer.exp_avg.")
    origin = key.format(1).replace("model.", "optimizer.exp_avg.")
    assert torch.equal(one.read(moment), old.read(origin) / 2)


def test_moments_of_unlike_gradients_are_bounded_above() -> None:
    gradients = torch.randn(50, 2, 7, dtype=torch.float64)
    seconds = [gradients[:, n].square().mean(dim=0) for n in range(2)]
    new = NewExpert(((0, 0.5), (1, 0.5)))
    truth = gradients.sum(dim=1).square().mean(dim=0)
    assert (expert_edit.combined("exp_avg_sq", seconds, new) >= truth - 1e-12).all()
    firsts = [gradients[:, n].mean(dim=0) for n in range(2)]
    expected = gradients.sum(dim=1).mean(dim=0)
    torch.testing.assert_close(expert_edit.combined("exp_avg", firsts, new), expected)


def moe(**options: object) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8}
    return TransformerConfig(**(sizes | options))


GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}


@pytest.mark.parametrize(
    ("kept_experts", "fits"),
    [
        ((0, 1, 2, 4, 5, 6), True),
        ((4, 5, 6, 7, 0, 1, 2, 3), True),
        ((0, 1, 2, 4), False),
        ((4, 5, 6, 7), False),
        ((0, 1, 2, 4, 5), False),
        ((0, 4, 1, 2, 3, 5, 6, 7), False),
    ],
)
def test_groups_of_neighbours_stay_whole(kept_experts, fits) -> None:
    problems = list(expert_rules.group_problems(moe(**GROUPS), {1: kept(kept_experts)}))
    assert (problems == []) is fits
    assert all("layer 1: --moe-router-num-groups 2" in problem for problem in problems)
    assert list(expert_rules.group_problems(moe(), {1: kept(kept_experts)})) == []


CLONE_REFUSALS = [
    ({"moe_router_score_function": "sigmoid", "moe_router_topk": 1}, False, "use --keep-topk"),
    (
        {"moe_router_load_balancing_type": ["sinkhorn"], "moe_router_topk": 1},
        False,
        "its own score (sinkhorn)",
    ),
    ({}, True, "--keep-topk needs --moe-router-topk 1, and layer 0 has 2"),
    (
        {"moe_router_type": "expert_choice", "moe_router_topk": 1},
        True,
        "excludes --moe-router-type expert_choice",
    ),
    (
        {
            "moe_router_pre_softmax": True,
            "moe_router_topk": 1,
            "moe_expert_capacity_factor": 1.0,
        },
        True,
        "excludes --moe-expert-capacity-factor 1.0",
    ),
]


@pytest.mark.parametrize(("options", "keep_topk", "message"), CLONE_REFUSALS)
def test_clones_that_cannot_keep_the_function_are_refused(options, keep_topk, message) -> None:
    config = moe(**options)
    layers = dict.fromkeys((0, 1), config.moe_router_topk)
    problems = list(expert_rules.clone_problems(config, layers, keep_topk=keep_topk))
    assert any(message in problem for problem in problems), problems


def test_a_scaling_factor_is_of_all_layers() -> None:
    config = moe(moe_router_type="expert_choice", moe_router_score_function="sigmoid")
    problems = list(expert_rules.clone_problems(config, {1: 2}, keep_topk=False))
    assert any("leave out --layers" in problem for problem in problems)
    assert expert_rules.scaling_of_clones(config, 4, keep_topk=False) == 0.25
    config = replace(config, moe_router_topk_scaling_factor=3.0)
    assert expert_rules.scaling_of_clones(config, 4, keep_topk=False) == 0.75


def test_hashes_and_dense_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="--moe-router-type hash"):
        expert_rules.refuse_hash(moe(moe_router_type="hash"))
    with pytest.raises(ConfigError, match="dense model"):
        expert_rules.experts_of(moe(num_moe_experts=None))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, ""),
        ({"moe_router_score_function": "sigmoid"}, ""),
        ({"moe_router_pre_softmax": True}, "softmax over all"),
        ({"moe_router_type": "expert_choice"}, "experts choose tokens"),
        (GROUPS, "group"),
        ({"moe_expert_capacity_factor": 1.0}, "capacity"),
    ],
)
def test_what_pruning_changes_besides_is_told(options, word) -> None:
    reasons = expert_rules.unlike(moe(**options))
    assert word in " ".join(reasons)
    assert bool(reasons) is bool(word)


def test_lists_are_read_as_written() -> None:
    assert expert_plans.numbers("0-2,6") == [0, 1, 2, 6]
    assert expert_plans.by_load([3, 9, 3, 0], 2) == [0, 1]
    assert expert_plans.per_layer(["0,1", "2:3"], {1: 4, 2: 4}, "--keep") == {1: "0,1", 2: "3"}
    plan = expert_plans.merged(4, [[3, 1]], {1: 1.0, 3: 3.0})
    assert [new.parts for new in plan] == [((0, 1.0),), ((1, 0.25), (3, 0.75)), ((2, 1.0),)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--help-me"], "say first what to do, prune, clone, merge, reorder, not --help-me"),
        (["prune"], "prune takes one of --keep, --drop, --unused-in and --keep-top, not none"),
        (["prune", "--keep", "0", "--drop", "1"], "not --keep and --drop"),
        (["prune", "--keep", "0-9"], "layer 1 has experts 0 to 3, not 4"),
        (["prune", "--keep", "0:1"], "layer 0 has no experts; MoE layers are 1, 2"),
        (["prune", "--keep", "a"], "'a' is no list of experts; write 0-3,6"),
        (["prune", "--keep", "1,1"], "names expert 1 twice"),
        (["prune", "--keep", "0"], "--moe-router-topk 2 must lie between 1 and --num-experts 1"),
        (["prune", "--drop", "0-3"], "layer 1 would have no expert left"),
        (["prune", "--keep-top", "2"], "--keep-top N and --tokens-in TRACE need each other"),
        (["prune", "--unused-in", "/nowhere"], "/nowhere holds no routing trace"),
        (["prune", "--keep", "0,1", "--layers", "0"], "--layers 0: layer 0 has no experts"),
        (["merge", "--groups", "0,1;1,2"], "has expert 1 twice"),
        (["merge", "--groups", "0,1", "--weights", "1"], "one number for each expert of --groups"),
        (["merge", "--groups", "0,1", "--weights", "0,0"], "experts 0, 1 sum to 0"),
        (["reorder", "--order", "0,1,2"], "leaves out expert 3 of layer 1"),
        (["clone", "--keep-topk"], "--keep-topk needs --moe-router-topk 1, and layer 1 has 2"),
        (["clone", "--copy", "2"], "did you mean --copies?"),
    ],
)
def test_mistakes_end_with_code_2(run_folder, tmp_path, call, words, message) -> None:
    verb, *rest = words
    call_words = (verb, "--load", run_folder, "--save", tmp_path / "new", *rest)
    code, text, errors = call(experts.main, *call_words)
    assert (code, text) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "new").exists()


def test_a_trace_of_another_model_is_refused(run_folder, trace, tmp_path, call) -> None:
    more = tmp_path / "more"
    call(experts.main, "clone", "--load", run_folder, "--save", more)
    words = ("prune", "--load", more, "--save", tmp_path / "new", "--unused-in", trace)
    code, _, errors = call(experts.main, *words)
    assert code == 2
    assert "layer 1 has 4 experts there and 8 in the checkpoint" in errors
