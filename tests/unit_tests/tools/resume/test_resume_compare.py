"""Each item can fail, alone, and is found where it differs first."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit_tests.tools.resume.records_made_by_hand import BEGIN, END, EXPERT, Run
from tools.resume.compare import (
    AFTER_STEP,
    AT_LOAD,
    IN_STEP,
    Findings,
    bits,
    compare_completeness,
    compare_runs,
    compare_tensors,
    same,
)
from tools.resume.items import ITEMS
from tools.resume.record_names import LOADED, after_step_folder

NORM = "decoder.layers.0.norm.weight"


def compared(tmp_path: Path, change: Callable[[Run], object]) -> Findings:
    want, got = Run(begin=0), Run(begin=BEGIN)
    change(got)
    unbroken, resumed = want.write(tmp_path / "want"), got.write(tmp_path / "got")
    findings = compare_runs(unbroken, resumed, range(BEGIN + 1, END + 1))
    loaded = unbroken.state(after_step_folder(BEGIN)), resumed.state(LOADED)
    compare_tensors(findings, *loaded, BEGIN, AT_LOAD)
    compare_completeness(findings, *loaded, ("exp_avg", "exp_avg_sq"), BEGIN)
    ends = [record.state(after_step_folder(END)) for record in (unbroken, resumed)]
    compare_tensors(findings, *ends, END, AFTER_STEP)
    return findings


def _loaded(name: str, value: object) -> Callable[[Run], None]:
    return lambda run: run.lines[1][0].update({name: value})


def _in_step(name: str, value: object) -> Callable[[Run], None]:
    return lambda run: run.step(1, 4).update({name: value})


def _tensor(key: str, folder: str = LOADED) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.tensors[folder][key] = run.tensors[folder][key].clone()
        run.tensors[folder][key][3, 1] += 0.25

    return change


CHANGES: list[tuple[str, int, Callable[[Run], object], str]] = [
    ("counters", AT_LOAD, _loaded("consumed_samples", 0), "rank 1, consumed_samples"),
    ("counters", AT_LOAD, _loaded("optimizer_steps", 1), "rank 1, optimizer_steps"),
    ("dropout stream", AT_LOAD, _loaded("dropout_seed", 7), "rank 1, seed"),
    ("random generators", AT_LOAD, _loaded("generators", {"torch": "x"}), "rank 1, torch"),
    ("loss scale", AT_LOAD, _loaded("loss_scale", {"scale": 1.0}), "rank 1, growth_tracker"),
    ("loss scale", AT_LOAD, _loaded("loss_scale", None), "rank 1, growth_tracker"),
    ("weights", AT_LOAD, _tensor(f"weight.{NORM}"), f"weight.{NORM}[3, 1] of rank 1"),
    (
        "experts",
        AT_LOAD,
        _tensor(f"weight.{EXPERT}.1.linear_fc1.weight"),
        f"weight.{EXPERT}.1.linear_fc1.weight[3, 1] of rank 1",
    ),
    ("main weights", AT_LOAD, _tensor(f"main_param.{NORM}"), f"main_param.{NORM}[3, 1] of rank 1"),
    ("first moment", AT_LOAD, _tensor(f"exp_avg.{NORM}"), f"exp_avg.{NORM}[3, 1] of rank 1"),
    ("second moment", AT_LOAD, _tensor(f"exp_avg_sq.{NORM}"), f"exp_avg_sq.{NORM}[3, 1] of rank 1"),
    (
        "expert bias",
        AT_LOAD,
        _tensor("buffer.decoder.layers.0.mlp.router.expert_bias"),
        "buffer.decoder.layers.0.mlp.router.expert_bias[3, 1] of rank 1",
    ),
    (
        "buffers",
        AT_LOAD,
        _tensor("buffer.decoder.layers.0.mlp.router.qb_beta"),
        "buffer.decoder.layers.0.mlp.router.qb_beta[3, 1] of rank 1",
    ),
    (
        "weights",
        AFTER_STEP,
        _tensor(f"weight.{NORM}", after_step_folder(END)),
        f"weight.{NORM}[3, 1] of rank 1",
    ),
    ("sample ids", IN_STEP, _in_step("samples", [[36, 1004], [38, 1005]]), "rank 1"),
    ("sample ids", IN_STEP, _in_step("samples", []), "rank 1"),
    ("samples", IN_STEP, _in_step("samples", [[36, 1004], [37, 9]]), "rank 1, sample 37"),
    ("learning rate", IN_STEP, _in_step("rates", [[0.5, 0.0], [0.5, 0.1]]), "rank 1"),
    ("weight decay", IN_STEP, _in_step("rates", [[4e-3, 0.0], [4e-3, 0.2]]), "rank 1"),
    ("loss", IN_STEP, _in_step("loss", 5.0), "rank 1"),
    ("gradient norm", IN_STEP, _in_step("grad_norm", float("nan")), "rank 1"),
    ("gradient norm", IN_STEP, _in_step("updated", False), "rank 1, update made"),
]


@pytest.mark.parametrize(("item", "when", "change", "where"), CHANGES)
def test_what_differs_is_found_alone_and_where(
    tmp_path: Path, item: str, when: int, change: Callable[[Run], object], where: str
) -> None:
    (cause,) = compared(tmp_path, change).causes()
    assert (cause.item.name, cause.when, cause.where) == (item, when, where)
    assert cause.iteration == (BEGIN if when == AT_LOAD else END)
    assert cause.want != cause.got


def test_every_item_has_a_change_that_it_finds() -> None:
    assert {item for item, *_ in CHANGES} == {item.name for item in ITEMS}


def test_equal_runs_have_no_difference_and_every_item_was_compared(tmp_path: Path) -> None:
    findings = compared(tmp_path, lambda run: None)
    assert findings.differences == []
    assert all(findings.compared[item.name] for item in ITEMS)


def test_values_of_both_runs_and_how_much_differs_are_told(tmp_path: Path) -> None:
    key = f"exp_avg.{NORM}"

    def lost(run: Run) -> None:
        run.tensors[LOADED][key] = torch.zeros(4, 3)

    (cause,) = compared(tmp_path, lost).causes()
    first = 1 / (1 + len(key))
    assert float(cause.want) == pytest.approx(first)
    assert cause.got == "0.0"
    assert cause.more == "6 of 6 elements differ; all are 0 here"


def test_a_tensor_that_only_one_run_has_differs(tmp_path: Path) -> None:
    (cause,) = compared(tmp_path, lambda run: run.tensors[LOADED].pop(f"weight.{NORM}")).causes()
    assert (cause.item.name, cause.want, cause.got) == ("weights", "float32 [4, 3]", "not there")


def test_a_moment_that_both_runs_leave_out_is_found(tmp_path: Path) -> None:
    want, got = Run(begin=0), Run(begin=BEGIN)
    lost = f"exp_avg_sq.{EXPERT}.1.linear_fc1.weight"
    del want.tensors[after_step_folder(BEGIN)][lost], got.tensors[LOADED][lost]
    states = want.write(tmp_path / "a").state(after_step_folder(BEGIN)), None
    loaded = got.write(tmp_path / "b").state(LOADED)
    findings = Findings()
    compare_completeness(findings, states[0], loaded, ("exp_avg", "exp_avg_sq"), BEGIN)
    assert [(one.item.name, one.where) for one in findings.differences] == [
        ("second moment", f"{lost} (of named_state)")
    ]


def test_a_block_that_no_rank_holds_is_found(tmp_path: Path) -> None:
    def without_the_second_half(run: Run) -> None:
        lines = run.tensors[LOADED]
        lines[f"weight.{NORM}"] = lines[f"weight.{NORM}"][:2]

    (cause,) = compared(tmp_path, without_the_second_half).causes()
    assert (cause.item.name, cause.got) == ("weights", "float32 [2, 3]")


def test_what_follows_from_a_first_difference_is_no_cause(tmp_path: Path) -> None:
    def late(run: Run) -> None:
        _tensor(f"exp_avg.{NORM}")(run)
        run.step(0, 4)["loss"] = 0.0

    findings = compared(tmp_path, late)
    assert [cause.item.name for cause in findings.causes()] == ["first moment"]
    assert {one.item.name for one in findings.differences} == {"first moment", "loss"}


def test_of_one_step_the_first_in_the_order_of_causes_is_the_cause(tmp_path: Path) -> None:
    def all_at_once(run: Run) -> None:
        run.step(0, 4).update(loss=0.0, grad_norm=0.0, samples=[[1, 1], [2, 2]])

    (cause,) = compared(tmp_path, all_at_once).causes()
    assert cause.item.name == "sample ids"


def test_bits_and_values_know_nan_and_the_sign_of_zero() -> None:
    assert torch.equal(bits(torch.tensor([torch.nan])), bits(torch.tensor([torch.nan])))
    assert not torch.equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))
    assert bits(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.int16
    assert same(float("nan"), float("nan"))
    assert same([1.0, [2]], [1.0, [2]])
    assert not same([1.0], [1.0, 2.0])
    assert not same(None, 0.0)
