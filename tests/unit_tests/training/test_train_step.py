"""R14 and the agreement to skip: the same numbers for every split over ranks and microbatches."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.errors import ConfigError, DataError
from megatron.training.loss import MaskedLoss
from megatron.training.run import TrainState
from megatron.training.train_step import agree, checked_loss, count_tokens, train_step
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import TOLERANCES
from tests.unit_tests.training.tiny_run import (
    SAMPLES,
    SEQ,
    gradients,
    masks,
    plain_forward_step,
    tiny_batches,
    tiny_run,
    weights,
)

EXACT = TOLERANCES[torch.float64]


def _one_step(flags: str, path: Path) -> None:
    run = tiny_run(f"{flags} --hidden-dropout 0.1 --attention-dropout 0.1 --clip-grad 0")
    state = TrainState(dropout_seed=7)
    outcome = train_step(run, state, tiny_batches(run))
    found = {"loss": outcome.lm_loss, "norm": outcome.grad_norm, "gradients": gradients(run)}
    torch.save(found, f"{path}.{dist.get_rank()}")


def _collect(path: Path, world_size: int) -> dict:
    parts = [torch.load(f"{path}.{rank}") for rank in range(world_size)]
    assert len({(part["loss"], part["norm"]) for part in parts}) == 1
    merged = {key: g for part in parts for key, g in part["gradients"].items()}
    return parts[0] | {"gradients": merged}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("one") / "step"
    run_ranks(_one_step, 1, f"--micro-batch-size {SAMPLES}", path)
    return _collect(path, 1)


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, "--micro-batch-size 1"),
        (2, "--micro-batch-size 2"),
        (2, "--micro-batch-size 1 --expert-model-parallel-size 2"),
        (4, "--micro-batch-size 1 --expert-model-parallel-size 2"),
    ],
)
def test_uneven_masks_give_the_same_loss_and_gradients(
    world_size: int, flags: str, one_process: dict, tmp_path: Path
) -> None:
    run_ranks(_one_step, world_size, flags, tmp_path / "step")
    found = _collect(tmp_path / "step", world_size)
    assert found["loss"] == pytest.approx(one_process["loss"], rel=1e-12)
    assert found["norm"] == pytest.approx(one_process["norm"], rel=1e-12)
    assert found["gradients"].keys() == one_process["gradients"].keys()
    # z-loss is a mean over microbatches of equal size, so it does not depend on the split either
    for key, expected in one_process["gradients"].items():
        torch.testing.assert_close(found["gradients"][key], expected, **EXACT, msg=key)


class _SpoiledOnce:
    """A forward step whose first losses on rank 1 are NaN."""

    calls = 0

    def __call__(self, data_iterator, model):
        output, loss_func = plain_forward_step(data_iterator, model)
        self.calls += 1
        return (output * float("nan") if self.calls == dist.get_rank() else output), loss_func


def _nan_on_one_rank() -> None:
    run, clean = tiny_run("--micro-batch-size 2", _SpoiledOnce()), tiny_run("--micro-batch-size 2")
    data, before = tiny_batches(run, torch.ones_like(masks())), weights(run)
    outcome = train_step(run, TrainState(), data)
    assert not outcome.updated
    assert outcome.lm_loss != outcome.lm_loss
    assert outcome.grad_norm is None
    for name, weight in weights(run).items():
        assert torch.equal(weight, before[name]), name
    after = train_step(run, TrainState(), data)
    expected = train_step(clean, TrainState(), tiny_batches(clean, torch.ones_like(masks())))
    assert after == expected
    for name, weight in weights(run).items():
        assert torch.equal(weight, weights(clean)[name]), name


def test_a_nan_on_one_rank_makes_all_ranks_skip_and_the_next_step_is_clean() -> None:
    run_ranks(_nan_on_one_rank, 2)


def _bad_gradient_on_one_rank() -> None:
    def forward_step(data_iterator, model):
        output, loss_func = plain_forward_step(data_iterator, model)
        if dist.get_rank() == 0:
            output.register_hook(lambda grad: grad * float("inf"))
        return output, loss_func

    run = tiny_run("--micro-batch-size 2", forward_step)
    before = weights(run)
    outcome = train_step(run, TrainState(), tiny_batches(run))
    assert not outcome.updated
    assert outcome.lm_loss == outcome.lm_loss
    for name, weight in weights(run).items():
        assert torch.equal(weight, before[name]), name


def test_a_gradient_that_overflows_on_one_rank_makes_all_ranks_skip() -> None:
    run_ranks(_bad_gradient_on_one_rank, 2)


def _nothing_counts() -> None:
    run = tiny_run("--micro-batch-size 2")
    outcome = train_step(run, TrainState(), tiny_batches(run, torch.zeros_like(masks())))
    assert outcome.lm_loss == 0.0
    assert outcome.updated


def test_a_batch_without_a_counted_token_has_loss_0() -> None:
    run_ranks(_nothing_counts, 2)


def _counting() -> None:
    run = tiny_run("--micro-batch-size 2")
    data = tiny_batches(run)
    mine = [next(data) for _ in range(run.num_microbatches)]
    counts = count_tokens(mine, run.world)
    assert counts.loss.item() == masks().sum().item()
    assert counts.valid.item() == SAMPLES * SEQ
    losses = torch.full((2,), float(dist.get_rank() + 1), dtype=torch.float64)
    loss, notes = agree(losses, torch.tensor(3.0), (1.0, 0.0), run.world)
    assert loss == 2.0  # (1 + 1 + 2 + 2) / 3
    assert notes == (2.0, 0.0)


def test_tokens_losses_and_notes_are_summed_over_all_ranks() -> None:
    run_ranks(_counting, 2)


def _every_microbatch_is_counted() -> None:
    run = tiny_run("--micro-batch-size 1 --expert-model-parallel-size 2")
    train_step(run, TrainState(), tiny_batches(run))
    report = run.moe_metrics.report(run.world.pg_collection)
    topk = run.config.model.moe_router_topk
    assert report.tokens_per_expert.sum(dim=1).tolist() == [SAMPLES * SEQ * topk] * 2


def test_experts_are_counted_over_all_microbatches_and_ranks() -> None:
    run_ranks(_every_microbatch_is_counted, 2)


def test_a_loss_function_in_another_form_is_refused_by_name() -> None:
    loss = MaskedLoss(torch.zeros(()), torch.ones(()))
    assert checked_loss(loss) is loss
    with pytest.raises(ConfigError, match=r"returned a tuple; .*MaskedLoss"):
        checked_loss((torch.zeros(()), {"lm loss": 0.0}))


def _too_few_batches() -> None:
    run = tiny_run("--micro-batch-size 1")
    batches = islice(tiny_batches(run), SAMPLES - 1)
    with pytest.raises(DataError, match=f"ended after {SAMPLES - 1} of the {SAMPLES} microbatches"):
        train_step(run, TrainState(), batches)


def test_data_that_ends_within_a_global_batch_is_an_error_before_anything_is_sent():
    run_ranks(_too_few_batches, 1)
