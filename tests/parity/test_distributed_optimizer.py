"""ZeRO-1 equals the plain optimizer on the same ranks, with and without overlap."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed import bucket_layout
from megatron.core.distributed.bucket_layout import Bucket
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import ParamAndGradBuffer
from megatron.core.optimizer import clip_grads, optimizer
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.layouts import LayoutResult, make_config, make_run, microbatches, run_layout
from tests.helpers.ranks import run_ranks

STEPS = 3
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "ep2": (4, {"expert_model_parallel_size": 2}),
    "etp2": (4, {"expert_tensor_parallel_size": 2}),
    "tp2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "num_moe_experts": None,
            "moe_aux_loss_coeff": None,
            "moe_z_loss_coeff": None,
            "ffn_hidden_size": 24,
        },
    ),
}
RUNS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    # eps well above rounding: Adam divides tiny gradients by their size
    "adam": {
        "optimizer": "adam",
        "lr": 1e-2,
        "adam_eps": 1e-3,
        "clip_grad": 0.1,
        "weight_decay": 0.1,
    },
    "bf16": {"optimizer": "adam", "lr": 1e-2, "clip_grad": 0.1, "fp64": False, "bf16": True},
}


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every rank own parts of parameters as small as these."""
    monkeypatch.setattr(bucket_layout, "BUFFER_ALIGNMENT", 64)
    monkeypatch.setattr(clip_grads, "BUFFER_ALIGNMENT", 64)


def run(layout: str, case: str, **options: Any) -> LayoutResult:
    """Train a few steps; buckets are small, so that there are many."""
    ranks, sizes = LAYOUTS[layout]
    settings = {"bucket_size": 700} | RUNS[case] | sizes | options
    return run_layout(ranks, steps=STEPS, **settings)


@functools.cache
def plain(layout: str, case: str) -> LayoutResult:
    """The run without sharding."""
    return run(layout, case)


def compare(got: LayoutResult, want: LayoutResult, *, rel: float = 1e-12) -> None:
    """Compare losses, norms and weights of every step; ``rel`` 0: the same bits of weights."""
    for step, (mine, theirs) in enumerate(zip(got.steps, want.steps, strict=True)):
        assert mine.lm_loss == pytest.approx(theirs.lm_loss, rel=rel), f"step {step}: loss"
        # added in another order
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=rel or 1e-14), (
            f"step {step}: norm"
        )
        assert sorted(mine.weights) == sorted(theirs.weights)
        for key, weight in theirs.weights.items():
            error = (mine.weights[key].double() - weight.double()).abs().max().item()
            bound = rel * weight.abs().max().item()
            assert error <= bound, f"step {step}: weight of {key}: {error=:.3g}"


QUICK = [("dp2", "bf16"), ("ep2", "adam"), ("dp4", "adam"), ("tp2", "adam"), ("etp2", "sgd")]
ALL = [(layout, case) for layout in LAYOUTS for case in RUNS if (layout, case) not in QUICK]
CASES = [*QUICK, *(pytest.param(*both, marks=pytest.mark.slow) for both in ALL)]


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_sharded_steps_equal_plain_ones(layout: str, case: str) -> None:
    rel = 2**-7 if case == "bf16" else 1e-12  # a weight that is rounded the other way
    if layout == "dp2" and case != "adam":  # two terms have one sum
        rel = 0.0
    compare(run(layout, case, **OVERLAPPED), plain(layout, case), rel=rel)


@pytest.mark.parametrize("layout", ["ep2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_overlap_changes_no_bit(layout: str) -> None:
    got, want = run(layout, "adam", **OVERLAPPED), run(layout, "adam", **SHARDED)
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert (mine.lm_loss, mine.grad_norm) == (theirs.lm_loss, theirs.grad_norm)
        for key, weight in theirs.weights.items():
            assert torch.equal(mine.weights[key], weight), key


class _OnlyWhenWaitedFor:
    """A gather that arrives as late as it may: when somebody waits for it."""

    def __init__(self, start: Any) -> None:
        self._start = start

    def wait(self) -> None:
        self._start().wait()


def _arrive_late(patch: pytest.MonkeyPatch) -> None:
    right = ParamAndGradBuffer.start_gather

    def late(self: ParamAndGradBuffer, start: int, end: int) -> _OnlyWhenWaitedFor:
        return _OnlyWhenWaitedFor(lambda: right(self, start, end))

    patch.setattr(ParamAndGradBuffer, "start_gather", late)


def _train(run: Run, state: TrainState, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):  # reads no weight in between: that would wait for all of them
        losses.append(train_step(run, state, microbatches(run, state.consumed_samples)).lm_loss)
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
    return losses


def _losses(folder: str, options: dict[str, Any]) -> None:
    run = make_run(make_config(**options))
    losses = _train(run, TrainState(dropout_seed=run.config.training.seed), STEPS)
    torch.save(losses, Path(folder) / f"{dist.get_rank()}.pt")


def losses_of(folder: Path, layout: str, case: str, **options: Any) -> list[float]:
    """Return the losses of steps between which nobody looks at weights."""
    ranks, sizes = LAYOUTS[layout]
    run_ranks(_losses, ranks, str(folder), {"bucket_size": 700} | RUNS[case] | sizes | options)
    found: list[float] = torch.load(folder / "0.pt")
    return found


def test_nobody_reads_weights_before_they_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [step.lm_loss for step in plain("ep2", "adam").steps]
    _arrive_late(monkeypatch)
    got = losses_of(tmp_path, "ep2", "adam", **OVERLAPPED)
    assert got == pytest.approx(want, rel=1e-12)


def test_weights_that_nobody_waits_for_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [step.lm_loss for step in plain("ep2", "adam").steps]
    _nobody_waits(monkeypatch)
    got = losses_of(tmp_path, "ep2", "adam", **OVERLAPPED)
    assert got[0] == pytest.approx(want[0], rel=1e-12)
    assert got[1] != pytest.approx(want[1], rel=1e-6)


def _halves(folder: str, options: dict[str, Any]) -> None:
    """Train 2 + 2 steps; the second two again in new runs, sharded and plain."""
    config = make_config(**options)
    run, state = make_run(config), TrainState(dropout_seed=config.training.seed)
    _train(run, state, 2)
    saved = save_checkpoint(folder, state, config=config, model=run.model, optimizer=run.optimizer)
    assert saved.path is not None, saved.error
    want = _train(run, state, 2)
    weights = dict(run.model.trainable_parameters())
    for change in ({}, dict.fromkeys(OVERLAPPED, False)):
        again = make_config(**(options | change))
        other = make_run(again)
        loaded = load_checkpoint(folder, config=again, model=other.model, optimizer=other.optimizer)
        assert _train(other, loaded.state(), 2) == want
        for name, param in other.model.trainable_parameters():
            assert torch.equal(param, weights[name]), name


def test_a_run_goes_on_to_the_bit_sharded_or_not(tmp_path: Path) -> None:
    run_ranks(_halves, 2, str(tmp_path), {"bucket_size": 700} | RUNS["bf16"] | OVERLAPPED)


def _skips(options: dict[str, Any]) -> None:
    run = make_run(make_config(**options))
    before = [param.clone() for _, param in run.model.trainable_parameters()]
    name, first = next(iter(run.model.trainable_parameters()))
    run.model.zero_grad_buffer()
    if dist.get_rank() == 1:
        first.main_grad.view(-1)[-1] = float("nan")
    run.model.finish_grad_sync()
    assert not run.optimizer.step().update_successful
    assert run.optimizer.step_count == 0
    assert run.model.nonfinite_gradients() == [name]
    for (_, param), old in zip(run.model.trainable_parameters(), before, strict=True):
        assert torch.equal(param, old)


@pytest.mark.parametrize("case", ["bf16", "sgd"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_all(case: str) -> None:
    run_ranks(_skips, 4, {"bucket_size": 700} | RUNS[case] | OVERLAPPED)


def _nobody_waits(patch: pytest.MonkeyPatch) -> None:
    _arrive_late(patch)
    patch.setattr(
        "megatron.core.distributed.param_gatherer.ParamGatherer._waiter",
        lambda self, numbers: lambda *_: None,
    )


def _stale_slices(patch: pytest.MonkeyPatch) -> None:
    right = DistributedDataParallel._start_gather

    def gather(self: DistributedDataParallel, bucket: Bucket) -> Any:
        return None if bucket is self.bucket_layout.buckets[1] else right(self, bucket)

    patch.setattr(DistributedDataParallel, "_start_gather", gather)


def _norm_of_own_slices(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer, "sum_over_ranks", lambda own, group: own)


def _experts_over_all_data_ranks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DistributedDataParallel, "_group", lambda self, key: self.pg_collection.dp_cp)


@pytest.mark.parametrize(
    ("plant", "wrong"),
    [
        (_stale_slices, "replicas of"),
        (_norm_of_own_slices, "ranks disagree"),
        (_experts_over_all_data_ranks, "step 0: norm|ranks disagree|replicas of"),
    ],
)
def test_a_planted_bug_is_seen(plant: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = plain("ep2", "adam")  # before the bug is there
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=wrong):
        compare(run("ep2", "adam", **OVERLAPPED), want)
