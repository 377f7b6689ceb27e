"""R15: evaluation changes nothing, and its loss is the sum over tokens of all ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.training.evaluate import evaluate
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import tiny_batches, tiny_run, weights


def _steps(evaluating: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = tiny_run("--micro-batch-size 2 --hidden-dropout 0.2")
    data, losses = tiny_batches(run), []
    for iteration in range(3):
        state = TrainState(iteration=iteration, consumed_samples=8 * iteration, dropout_seed=3)
        losses.append(train_step(run, state, data).lm_loss)
        if evaluating:
            evaluate(run, tiny_batches(run), num_batches=1)
            assert run.model.training
    report = run.moe_metrics.report(run.world.pg_collection)
    return losses, weights(run) | {"counts": report.tokens_per_expert}


def _with_and_without() -> None:
    generator_state = torch.get_rng_state()
    losses, ends = _steps(evaluating=False)
    again, ends_again = _steps(evaluating=True)
    assert losses == again
    for name, tensor in ends.items():
        assert torch.equal(tensor, ends_again[name]), name
    assert torch.equal(generator_state, torch.get_rng_state())


def test_evaluating_in_between_changes_no_later_step() -> None:
    run_ranks(_with_and_without, 2)


def _loss(path: Path) -> None:
    run = tiny_run("--micro-batch-size 2 --hidden-dropout 0.5")
    loss = evaluate(run, tiny_batches(run), num_batches=2)
    Path(f"{path}.{dist.get_rank()}").write_text(repr(loss))


def test_the_loss_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(_loss, 1, tmp_path / "one")
    run_ranks(_loss, 2, tmp_path / "two")
    one, two = (float((tmp_path / name).read_text()) for name in ("one.0", "two.1"))
    assert two == pytest.approx(one, rel=1e-13)
