"""Surgery on experts against the unbroken run and against the same surgery on live tensors, fp64.

A cloned or reordered model computes what it did, and three more steps of training are those of the
unbroken run; a pruned one is bit-equal on the trace that says which experts are unused.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.training.checkpoint_model import load_trained_model
from megatron.training.checkpointing import unwrap
from megatron.training.routing_trace import open_tracer
from megatron.training.run import Run
from tests.helpers.small_runs import alone_in_the_world, loaded, saved, steps, tensors_of
from tests.helpers.tolerances import TOLERANCES
from tests.unit_tests.training.tiny_run import tiny_batches
from tools.checkpoint import expert_edit, experts
from tools.checkpoint.keys import parts_of, with_expert

EXACT = TOLERANCES[torch.float64]
AUX = "--moe-aux-loss-coeff 0.1"
SIGMOID = "--moe-router-score-function sigmoid"
BIAS = "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.05"
GROUPS = "--moe-router-num-groups 2 --moe-router-group-topk 1"
BIASES = "--add-mlp-bias --moe-router-bias"
CHOICE = "--moe-router-type expert_choice"
PATTERN = "--moe-num-experts-per-layer"
PER_LAYER = f'{PATTERN} "([4]+[6])" --moe-router-topk-per-layer "([2]+[3])"'


@pytest.fixture
def alone() -> Iterator[None]:
    with alone_in_the_world():
        yield


def surgery(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[Path, str]:
    """Call the tool as a user would; return the new folder and the flags it says to give."""
    new = folder.with_name(f"{folder.name}_{words[0]}")
    experts.main([words[0], "--load", str(folder), "--save", str(new), *words[1:]])
    told = [line for line in capsys.readouterr().out.splitlines() if "to train on:" in line]
    return new, told[0].partition(f"--load {new} ")[2] if told else ""


def logits_of(folder: Path, tokens: Tensor | None = None) -> Tensor:
    model = load_trained_model(folder).model
    if tokens is None:
        tokens = torch.randint(127, (4, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


def origin_of(key: str, copies: int) -> tuple[str, float]:
    """Return the tensor that a clone was made of, and its share of a gradient."""
    parts = parts_of(key)
    power = {"exp_avg": 1, "exp_avg_sq": 2}.get(parts.kind, 0)
    if parts.expert is None:
        return key, float(copies) ** -power if parts.router else 1.0
    return with_expert(key, parts.expert // copies), float(copies) ** -power


CLONES = {
    "softmax": f"{AUX} --moe-shared-expert-intermediate-size 16",
    "pre_softmax_top1": f"{AUX} --moe-router-pre-softmax --moe-router-topk 1",
    "pre_softmax_groups": f"--moe-router-pre-softmax {GROUPS} --num-experts 8",
    "sigmoid_bias": f"{SIGMOID} {BIAS} {AUX}",
    "sigmoid_groups": f"{SIGMOID} {BIAS} {GROUPS} --num-experts 8",
    "sigmoid_as_it_is": f"{SIGMOID} --no-moe-router-norm-topk-prob {AUX}",
    "judged_groups": f"{SIGMOID} {BIAS} --num-experts 8 --moe-router-num-groups 4 "
    "--moe-router-group-topk 2 --moe-router-group-score-topk 2 --moe-router-topk 3",
    "biases": f"{BIASES} {AUX}",
    "sqrtsoftplus": f"--moe-router-score-function sqrtsoftplus {AUX} "
    "--moe-router-topk-scaling-factor 2.5",
    "capacity": "--moe-expert-capacity-factor 1.0",
    "quantile": "--moe-router-load-balancing-type quantile_balancing",
    "sinkhorn": "--moe-router-load-balancing-type sinkhorn",
    "expert_choice": CHOICE,
    "expert_choice_sigmoid": f"{CHOICE} {SIGMOID}",
    "per_layer": f"{PER_LAYER} {AUX}",
    "dense_layer": '--moe-layer-freq "([0]+[1])" --moe-latent-size 8',
}


@pytest.mark.parametrize("case", CLONES)
def test_a_cloned_model_computes_and_trains_as_before(case, tmp_path, alone, capsys) -> None:
    copies = 3 if case == "softmax" else 2
    run = saved(tmp_path / "run", CLONES[case])
    new, flags = surgery(capsys, tmp_path / "run", "clone", "--copies", str(copies))
    torch.testing.assert_close(logits_of(new), logits_of(tmp_path / "run"), **EXACT)
    want = steps(run, 3, first=2)
    got = steps(loaded(new, f"{CLONES[case]} {flags}"), 3, first=2)
    torch.testing.assert_close(got.losses, want.losses, **EXACT)
    for key, tensor in got.tensors.items():
        origin, share = origin_of(key, copies)
        expected = want.tensors[origin]
        if parts_of(key).router is not None:
            expected = expected.repeat_interleave(copies, dim=0)
        tolerance = EXACT if tensor.dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(
            tensor, expected * share, **tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(
    "flags", ["--moe-router-pre-softmax --moe-router-topk-scaling-factor 1.5", f"{SIGMOID} {BIAS}"]
)
def test_copies_beside_a_single_choice_change_nothing(flags, tmp_path, alone, capsys) -> None:
    saved(tmp_path / "run", f"{flags} --moe-router-topk 1")
    new, told = surgery(capsys, tmp_path / "run", "clone", "--keep-topk")
    assert "--moe-router-topk " not in told
    torch.testing.assert_close(logits_of(new), logits_of(tmp_path / "run"), **EXACT)
    steps(
        loaded(new, f"{flags} --moe-router-topk 1 {told}".replace("factor 1.5 ", "factor 3.0 ")), 1
    )


ORDER = (2, 0, 3, 1)


@pytest.mark.parametrize(
    "flags",
    [AUX, f"{SIGMOID} {BIAS} {AUX}", f"{BIASES} {AUX}"],
    ids=["softmax", "sigmoid", "biases"],
)
def test_reordered_experts_train_as_the_unbroken_run(flags, tmp_path, alone, capsys) -> None:
    run = saved(tmp_path / "run", flags)
    new, told = surgery(capsys, tmp_path / "run", "reorder", "--order", ",".join(map(str, ORDER)))
    assert told == ""
    torch.testing.assert_close(logits_of(new), logits_of(tmp_path / "run"), **EXACT)
    want, got = steps(run, 3, first=2), steps(loaded(new, flags), 3, first=2)
    torch.testing.assert_close(got.losses, want.losses, **EXACT)
    for key, tensor in got.tensors.items():
        parts = parts_of(key)
        origin = key if parts.expert is None else with_expert(key, ORDER[parts.expert])
        expected = want.tensors[origin]
        expected = expected[list(ORDER)] if parts.router is not None else expected
        torch.testing.assert_close(tensor, expected, **EXACT)


DEAD = {0: (1, 4), 1: (0, 2, 5)}


def _kill_experts(run: Run) -> None:
    """Give every token a part that some experts, and they alone, reject."""
    model = unwrap(run.model)
    for layer, dead in DEAD.items():
        block = model.decoder.layers[str(layer)]
        rows = block.mlp.router.weight
        with torch.no_grad():
            block.pre_mlp_layernorm.bias.fill_(1.0)
            rows -= rows.mean(dim=1, keepdim=True)  # only the others' part of a token counts
            rows *= 20.0  # or some would be unused by chance
            rows[list(dead)] -= 1.0
    run.optimizer.after_load(with_optim=False)


def _without_dead(tensors: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """The same surgery on tensors in memory, written down a second time."""
    kept = {layer: [e for e in range(num_experts) if e not in dead] for layer, dead in DEAD.items()}
    found = {}
    for key, tensor in tensors.items():
        words = key.split(".")
        layer = int(words[words.index("layers") + 1]) if "layers" in words else None
        if layer is None:
            found[key] = tensor
        elif "router" in words:
            found[key] = tensor[kept[layer]]
        elif "local_experts" in words:
            place = words.index("local_experts") + 1
            if int(words[place]) in kept[layer]:
                words[place] = str(kept[layer].index(int(words[place])))
                found[".".join(words)] = tensor
        else:
            found[key] = tensor
    return found


@pytest.mark.parametrize(
    "flags", ["", f"{SIGMOID} --fp32", BIASES], ids=["softmax", "sigmoid_fp32", "biases"]
)
def test_experts_that_a_trace_shows_unused_are_not_missed(flags, tmp_path, alone, capsys) -> None:
    flags = f"{flags} --num-experts 8"
    run = saved(tmp_path / "run", flags, _kill_experts)
    before = tensors_of(run)
    run.config.logging.moe_routing_trace_path = str(tmp_path / "trace")
    want = steps(replace(run, router_tracer=open_tracer(run, 2)), 3, first=2)
    words = ("prune", "--unused-in", str(tmp_path / "trace"), "--last-step", "3")
    new, told = surgery(capsys, tmp_path / "run", *words)
    assert told == '--moe-num-experts-per-layer "([6]+[5])"'
    tokens = next(tiny_batches(run)).tokens
    assert torch.equal(logits_of(new, tokens), logits_of(tmp_path / "run", tokens))
    other = loaded(new, f"{flags.replace('--num-experts 8', '')} {told}")
    assert_equal(tensors_of(other), _without_dead(before, 8))
    got = steps(other, 3, first=2)
    assert got.losses == want.losses
    expected = _without_dead(want.tensors, 8)
    assert got.tensors.keys() == expected.keys()
    for key, tensor in got.tensors.items():
        torch.testing.assert_close(tensor, expected[key], **TOLERANCES[tensor.dtype])


def test_a_cloned_model_in_fp32_computes_to_rounding(tmp_path, alone, capsys) -> None:
    saved(tmp_path / "run", f"--fp32 {AUX}")
    new, _ = surgery(capsys, tmp_path / "run", "clone", "--copies", "3")
    want = logits_of(tmp_path / "run")
    assert want.dtype == torch.float32
    assert (logits_of(new) - want).abs().max() <= 1e-6 * want.abs().max()


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [key for key in got if not torch.equal(got[key], want[key])] == []


def test_merging_clones_gives_the_model_back(tmp_path, alone, capsys) -> None:
    run = saved(tmp_path / "run", f"{SIGMOID} {BIAS}")
    before = tensors_of(run)
    new, _ = surgery(capsys, tmp_path / "run", "clone", "--copies", "2")
    back, told = surgery(
        capsys, new, "merge", "--groups", "0,1;2,3;4,5;6,7", "--weights", "1,3;1,1;1,1;0,2",
        "--topk", "2",
    )  # fmt: skip
    assert told == "--num-experts 4 --moe-router-topk 2"
    after = tensors_of(loaded(back, f"{SIGMOID} {BIAS}"))
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(tensor, before[key], rtol=1e-15, atol=0.0)


def test_main_weights_follow_and_weights_are_their_rounding(tmp_path, alone, capsys) -> None:
    flags = f"--bf16 {SIGMOID} {BIAS}"
    run = saved(tmp_path / "run", flags)
    before = tensors_of(run)
    new, told = surgery(capsys, tmp_path / "run", "merge", "--groups", "1:0,3", "--weights", "3,1")
    after = tensors_of(loaded(new, f"{flags} {told}"))
    name = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc2.weight"
    main = "optimizer.main_param." + name
    mean = 0.75 * before[main.format(0)].double() + 0.25 * before[main.format(3)].double()
    assert torch.equal(after[main.format(0)], mean.float())
    assert torch.equal(after["model." + name.format(0)], mean.float().bfloat16())
    assert torch.equal(after[main.format(2)], before[main.format(2)])
    steps(loaded(new, f"{flags} {told}"), 1)


# What a careless tool would do, and the test that must fail then.
def _forgets_the_share(kind, tensors, new):
    return tensors[0]


def _averages_all(kind, tensors, new):
    return tensors[0] * new.share if new.is_copy else torch.stack(list(tensors)).mean(dim=0)


def _takes_the_neighbours(source, key, plan):
    return expert_edit_router(source, key, plan[1:] + plan[:1])


expert_edit_router = expert_edit._router_tensor
PLANTED = {
    "moments keep the size of the original": (
        "combined",
        _forgets_the_share,
        lambda *a: test_a_cloned_model_computes_and_trains_as_before("softmax", *a),
    ),
    "router rows of the neighbours": (
        "_router_tensor",
        _takes_the_neighbours,
        lambda *a: test_reordered_experts_train_as_the_unbroken_run(AUX, *a),
    ),
    "router rows of the neighbours, pruned": (
        "_router_tensor",
        _takes_the_neighbours,
        lambda *a: test_experts_that_a_trace_shows_unused_are_not_missed("", *a),
    ),
    "moments averaged like weights": (
        "combined",
        _averages_all,
        test_merging_clones_gives_the_model_back,
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_mistake_is_caught(what, tmp_path, alone, capsys, monkeypatch) -> None:
    name, wrong, proof = PLANTED[what]
    monkeypatch.setattr(expert_edit, name, wrong)
    with pytest.raises(AssertionError):
        proof(tmp_path, None, capsys)
