"""What a run writes about its experts: every step finite, one step not, losses of each layer."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.transformer.moe import moe_report
from megatron.training.metrics import MetricsWriter
from megatron.training.reporting import Reporter
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import VOCAB, tiny_batches, tiny_run

FLAGS = "--micro-batch-size 2 --log-interval 3"


def _train(run: Run, folder: Path, steps: int, poisoned: int | None = None) -> None:
    """Make steps and report them; in the ``poisoned`` one a weight is NaN on all ranks."""
    writer = None
    if dist.get_rank() == 0:
        writer = MetricsWriter(run.config.logging, folder, 0)
    reporter, state, data = Reporter(run, writer, vocab_size=VOCAB), TrainState(), tiny_batches(run)
    reporter._first = False
    weight = next(iter(run.model.parameters())).data
    for number in range(1, steps + 1):
        before = weight.clone()
        if number == poisoned:
            weight.fill_(math.nan)
        outcome = train_step(run, state, data)
        if number == poisoned:
            assert not outcome.updated
            weight.copy_(before)
        state.iteration += 1
        reporter.record(state, outcome)
    if writer is not None:
        writer.close()


def _lines(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def _plain(folder: Path, flags: str, poisoned: int | None) -> None:
    _train(tiny_run(f"{FLAGS} {flags}"), folder, 3, poisoned)


def test_a_step_that_is_not_finite_does_not_hide_the_others(tmp_path):
    run_ranks(_plain, 2, tmp_path, "--moe-aux-loss-coeff 1e-2", 2)
    last = _lines(tmp_path)[-1]
    assert last["moe/left_out_sum"] == 2 * 2 * 2, "microbatches x layers x ranks"
    for name in ("moe/load_balancing_loss", "moe/z_loss", "moe/layer_1/entropy_nats"):
        assert last[name] is not None, name
        assert math.isfinite(last[name]), name
    counts = torch.tensor(_lines(tmp_path, "expert_load")[-1]["tokens_per_expert"])
    assert counts.sum(dim=1).tolist() == [2 * 8 * 16 * 2] * 2, "two steps of three"


def test_left_out_values_are_warned_of():
    report = moe_report.MoEReport(
        (moe_report.LayerUse(layer=0, tokens_per_expert=torch.tensor([1, 1]), topk=1, left_out=3),)
    )
    assert report.warnings()[0].startswith(
        "values of the router were not finite and are left out in MoE layers 0 (3 microbatches)"
    )


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--moe-aux-loss-coeff 1e-2", ["load_balancing_loss", "z_loss"]),
        (
            "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2",
            ["seq_load_balancing_loss", "z_loss"],
        ),
        ("--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-2",
         ["global_load_balancing_loss", "z_loss"]),
    ],
)  # fmt: skip
def test_the_losses_in_force_are_written_and_those_of_each_layer_when_asked_for(
    flags, names, tmp_path
):
    run_ranks(_plain, 1, tmp_path / "off", flags, None)
    run_ranks(_plain, 1, tmp_path / "on", f"{flags} --moe-per-layer-logging", None)
    off, on = _lines(tmp_path / "off")[-1], _lines(tmp_path / "on")[-1]
    assert {key for key in off if key.endswith("_loss") and key != "lm_loss"} == {
        f"moe/{name}" for name in names
    }
    assert on.keys() - off.keys() == {f"moe/{n}_layer_{i}" for n in names for i in range(2)}
    for name in names:
        mean = (on[f"moe/{name}_layer_0"] + on[f"moe/{name}_layer_1"]) / 2
        assert mean == pytest.approx(on[f"moe/{name}"])
        assert on[f"moe/{name}"] == off[f"moe/{name}"]
    assert "moe/layer_1/variation" in off, "load of each layer is always there"


def _warned(folder: Path) -> None:
    run = tiny_run(f"{FLAGS} --log-interval 1 --expert-model-parallel-size 2")
    for name, param in run.model.named_parameters():
        if name.endswith("router.weight"):
            param.data.zero_()  # equal logits: every token takes experts 0 and 1
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("megatron.training.reporting").addHandler(handler)
    _train(run, folder, 1)
    if dist.get_rank() == 0:
        text = "\n".join(records)
        assert "experts without tokens in MoE layers 0 (2 of 4), 1 (2 of 4)" in text
        assert "routing collapses in MoE layers 0 (2.0 x the mean), 1" in text
        assert "expert-parallel ranks are unevenly loaded in MoE layers 0 (2.00 x" in text


def test_a_collapsed_router_is_warned_of_at_the_next_line(tmp_path):
    run_ranks(_warned, 2, tmp_path)


def test_losses_of_multi_token_prediction_are_told_as_megatron_tells_them(tmp_path):
    run_ranks(_with_depths, 2, tmp_path)
    lines = _lines(tmp_path)
    assert len(lines) == 3
    for depth in (1, 2):
        told = [line[f"mtp_{depth}_loss"] for line in lines]
        assert all(3 < loss < 7 for loss in told), "near ln(128), of a mean over labels"
        assert len({round(loss, 9) for loss in told}) == 3
    (line,) = (tmp_path / "told.txt").read_text().splitlines()
    first, second = (sum(line[f"mtp_{d}_loss"] for line in lines) / 3 for d in (1, 2))
    assert f" | mtp_1 loss: {first:.6E} | mtp_2 loss: {second:.6E} | " in line
    assert line.index("lm loss") < line.index("mtp_1 loss")


def _with_depths(folder: Path) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron.training.reporting")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    _train(tiny_run(f"{FLAGS} --mtp-num-layers 2"), folder, 3)
    if dist.get_rank() == 0:
        (folder / "told.txt").write_text("\n".join(t for t in told if "iteration" in t))
