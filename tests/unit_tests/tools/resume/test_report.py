"""The report: causes stand out from what follows, the first difference and its likely cause."""

import json
import re
from pathlib import Path

from tests.unit_tests.tools.resume.records_made_by_hand import BEGIN, END, EXPERT, Run
from tools.resume.compare import AFTER_STEP, AT_LOAD, Findings, compare_runs, compare_tensors
from tools.resume.other_layouts import Span, judge
from tools.resume.proof import Proof, Settings
from tools.resume.record_names import LOADED, after_step_folder
from tools.resume.report import data, text
from tools.resume.runs import Killed


def proof_of(tmp_path: Path, killed: Run, resumed: Run) -> Proof:
    unbroken = Run(begin=0).write(tmp_path / "unbroken")
    before, after = killed.write(tmp_path / "killed"), resumed.write(tmp_path / "resumed")
    found = compare_runs(unbroken, after, range(BEGIN + 1, END + 1))
    states = unbroken.state(after_step_folder(BEGIN)), after.state(LOADED)
    compare_tensors(found, *states, BEGIN, AT_LOAD)
    ends = [record.state(after_step_folder(END)) for record in (unbroken, after)]
    compare_tensors(found, ends[0], ends[1], END, AFTER_STEP)
    span = Span(BEGIN, END)
    other = judge(unbroken, after, span, "float32", layout="1 rank, DP 1", seconds=1.0)
    return Proof(
        killed=Killed(3, 12.5, BEGIN),
        iterations=END,
        before=compare_runs(unbroken, before, range(1, 4)),
        resumed=found,
        others=[other],
    )


def settings() -> Settings:
    return Settings(
        script=Path("pretrain_gpt.py"),
        words=[],
        world_size=2,
        iterations=END,
        train_iters=10,
        save_interval=1,
        seed=5,
        folder=Path(),
        optimizer="adam",
        precision="float32",
        others=[],
    )


def row(said: str, first: str) -> list[str]:
    rows = [re.split("  +", line) for line in said.splitlines()]
    return next(cells for cells in rows if cells[0] == first)


def test_a_pass_says_so_of_every_item_and_layout(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, Run(begin=0), Run(begin=BEGIN))
    said = text(settings(), proof)
    assert proof.passes
    assert "DIFFERS" not in said
    assert "first:" not in said
    assert row(said, "loss")[-1] == "same"
    assert row(said, "1 rank, DP 1")[-1] == "pass"
    assert said.splitlines()[-1] == (
        f"PASS: resumed at iteration {BEGIN} after SIGKILL, the run is the unbroken run on 2 ranks "
        "and 1 other layout (seed 5)"
    )


def test_a_cause_stands_out_from_what_follows_and_has_a_hint(tmp_path: Path) -> None:
    resumed = Run(begin=BEGIN)
    lost = f"weight.{EXPERT}.1.linear_fc1.weight"
    resumed.tensors[LOADED][lost] = resumed.tensors[LOADED][lost] + 1
    resumed.step(0, 3)["loss"] = 9.0
    proof = proof_of(tmp_path, Run(begin=0), resumed)
    said = text(settings(), proof)
    assert not proof.passes
    assert row(said, "experts")[2] == "DIFFERS"
    assert row(said, "loss")[2] == "follows"
    assert (
        f"first: experts, right after loading iteration {BEGIN}, {lost}[0, 0] of rank 0: " in said
    )
    assert "likely: the weights of an expert was not saved" not in said
    assert "of all experts only number 1 differs" in said
    assert said.splitlines()[-1] == "FAIL: experts, 1 rank, DP 1 (seed 5)"


def test_numbers_of_the_table_are_short_but_never_look_alike(tmp_path: Path) -> None:
    resumed = Run(begin=BEGIN)
    resumed.step(0, 3)["loss"] = 9.0
    resumed.step(0, 3)["grad_norm"] *= 1 + 1e-15
    said = text(settings(), proof_of(tmp_path, Run(begin=0), resumed))
    assert row(said, "loss")[3] == "step 3, rank 0: 4.57143 -> 9"
    assert row(said, "gradient norm")[3] == f"step 3, rank 0: 2.0 -> {2.0 * (1 + 1e-15)}"


def test_a_run_that_does_not_repeat_itself_is_told_before_all(tmp_path: Path) -> None:
    killed = Run(begin=0)
    killed.step(1, 2)["loss"] = 9.0
    said = text(settings(), proof_of(tmp_path, killed, Run(begin=BEGIN)))
    assert "first: loss, step 2, rank 1" in said
    assert "does not repeat itself" in said
    assert said.splitlines()[-1] == "FAIL: repeatable (seed 5)"


def test_a_resumed_run_that_ended_with_an_error_fails(tmp_path: Path) -> None:
    proof = Proof(
        killed=Killed(3, 0.0, BEGIN),
        iterations=END,
        before=Findings(),
        resumed=Findings(),
        failure="the resumed run failed: rank 0 ended with exit code 2",
    )
    assert not proof.passes
    said = text(settings(), proof)
    assert "first: no resumed run: the resumed run failed" in said
    assert said.splitlines()[-1] == "FAIL: no resumed run (seed 5)"


def test_the_report_for_programs_is_json_with_the_same_verdicts(tmp_path: Path) -> None:
    resumed = Run(begin=BEGIN)
    resumed.lines[0][0]["dropout_seed"] = 7
    told = json.loads(json.dumps(data(settings(), proof_of(tmp_path, Run(begin=0), resumed))))
    assert not told["passes"]
    assert told["killed"] == {"step": 3, "after_ms": 12.5, "checkpoint": BEGIN}
    (cause,) = told["causes"]
    assert (cause["item"], cause["moment"], cause["want"], cause["got"]) == (
        "dropout stream",
        "loading",
        "1234",
        "7",
    )
    verdicts = {entry["item"]: entry["verdict"] for entry in told["items"]}
    assert verdicts["dropout stream"] == "DIFFERS"
    assert verdicts["weights"] == "same"
    assert told["layouts"][0]["differences"][0]["item"] == "dropout stream"
