"""The bench of the step: all contenders do the same work, and its limits are of that work."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.training.arguments import parse_args
from tests.helpers.ranks import run_ranks
from tools.bench import step, step_memory, step_peers
from tools.bench.roofline import bytes_of_parts
from tools.bench.roofline_products import linears, time_products
from tools.bench.step_ours import Data, Size, Step, bench_s, gemm_flops, step_flags
from tools.bench.step_page import write_page
from tools.bench.step_peers import CONTENDERS, make_peers, missing

ROOT = Path(__file__).parents[2]
SMALL = Size(hidden=32, vocabulary=64, sequence=16, microbatch=2)
WORDS = ["--hidden-size=32", "--vocab-size=64", "--seq-length=16", "--micro-batch-size=2"]


def _contenders(bf16: bool) -> tuple[Data, list]:
    data = Data(SMALL)
    ours = Step(bench_s(SMALL.hidden, bf16=bf16), SMALL, "cpu", data)
    names = [name for name in CONTENDERS if name != "transformers-eager"]  # shares a model
    return data, [ours, *make_peers(names, ours, data)]


def _train_alike() -> None:
    data, contenders = _contenders(bf16=False)
    assert len(contenders) == 4 - ("torchtitan" in missing()) - (len(missing()) > 1)
    first, losses = {one.num_parameters for one in contenders}, []
    assert len(first) == 1, first
    for _ in range(4):
        for one in contenders:
            one()
        losses.append([one.loss for one in contenders])
        data.draw()
    for turn in losses:
        torch.testing.assert_close(torch.tensor(turn), torch.full((len(turn),), turn[0]))
    assert losses[0][0] != losses[1][0]


def test_all_contenders_train_the_same_weights_to_the_same_losses():
    run_ranks(_train_alike, 1)


def _agree_in_bf16() -> None:
    _, contenders = _contenders(bf16=True)
    losses = {one.name: one.forward_loss() for one in contenders}
    step.refuse_other_work(contenders, losses, "bf16")
    with pytest.raises(SystemExit, match="losses at equal weights disagree"):
        step.refuse_other_work(contenders, losses | {"ours": 1.01 * losses["ours"]}, "bf16")
    contenders[1].params.pop()
    with pytest.raises(SystemExit, match="different numbers of parameters"):
        step.refuse_other_work(contenders, losses, "bf16")


def test_a_contender_with_another_loss_or_size_ends_the_run():
    run_ranks(_agree_in_bf16, 1)


def _count_flops() -> None:
    data = Data(SMALL)
    config = bench_s(SMALL.hidden, bf16=False)
    ours = Step(config, SMALL, "cpu", data)
    (textbook,) = make_peers(["textbook"], ours, data)
    with FlopCounterMode(display=False) as counter:
        textbook.loss_of(*data.pair("cpu")).backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for name, n in counted.items() if "attention" not in name)
    attention = 6.0 * config.num_layers * SMALL.tokens * SMALL.sequence * SMALL.hidden
    assert products == gemm_flops(config, SMALL) - attention
    assert bytes_of_parts(config, SMALL)["AdamW, norm, zero, copies"] == 36.0 * ours.num_parameters
    routers = 6.0 * config.num_layers * SMALL.tokens * SMALL.hidden * config.num_moe_experts
    found = time_products(config, SMALL, torch.float32, "cpu", rounds=1)
    assert found.flops == products - routers
    assert set(found.seconds) == set(found.flops_of)
    assert len(found.seconds) == 3 * len(linears(config, SMALL))


def test_counted_work_is_what_torch_counts():
    run_ranks(_count_flops, 1)


def test_the_timed_model_is_that_of_the_command_line():
    for bf16 in (False, True):
        model = parse_args(step_flags(SMALL, bf16=bf16), world_size=1).model
        ours = bench_s(SMALL.hidden, bf16=bf16)
        ours.max_position_embeddings = SMALL.sequence
        assert model == ours


def test_who_is_missing_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(step_peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(step_peers, "why_no_titan", lambda: "torchtitan cannot be imported")
    assert set(missing()) == {n for n in CONTENDERS if n.startswith(("transformers", "torcht"))}
    monkeypatch.setattr(step, "missing", missing)
    monkeypatch.setattr(sys, "argv", ["step.py", *WORDS, "--parts", "memory", "--dtypes", "fp32"])
    monkeypatch.setattr(step, "memory_rows", lambda args, device: [])
    monkeypatch.setattr(step, "world_of_one", lambda: torch.no_grad())
    step.main()
    said = capsys.readouterr().out
    assert "transformers-eager is left out: transformers is not installed" in said
    assert "torchtitan is left out: torchtitan cannot be imported" in said


def test_memory_of_a_step_is_what_the_dry_run_foretells():
    found = step_memory.in_own_process("ours", "bf16", SMALL)
    use = step_memory.foretold(SMALL, "bf16", "cpu")
    assert found["tensors_mib"] == pytest.approx(use.total / (1 << 20), rel=0.1)
    assert found["resident_mib"] > found["tensors_mib"]


@pytest.mark.slow
def test_the_page_has_all_tables(tmp_path):
    page = tmp_path / "step.md"
    tool = ROOT / "tools" / "bench" / "step.py"
    words = [*WORDS, "--rounds", "1", "--dtypes", "fp32", "--markdown", str(page)]
    done = subprocess.run([sys.executable, tool, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    for title in ("Against what", "The least", "Products at", "Memory of a step"):
        assert f"## {title}" in text
    for name in CONTENDERS:
        assert text.count(f"| fp32 | {name} |") == (0 if name in missing() else 2)


def test_a_page_without_measurements_has_only_its_head(tmp_path):
    names = ("step", "step_roofline", "step_products", "step_memory")
    write_page(tmp_path / "page.md", dict.fromkeys(names, ()))
    assert "## " not in (tmp_path / "page.md").read_text()
