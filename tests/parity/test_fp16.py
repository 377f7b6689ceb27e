"""fp16 with a loss scale: powers of two change nothing, the scale is found, and so in every layout.

Exact where the arithmetic is: a scale of a power of two changes no bit of fp32 or fp64.
"""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.layouts import LayoutResult, make_config, make_run, microbatches, run_layout
from tests.helpers.ranks import run_ranks

SCALE = 2.0**24
EXACT = {  # every loss that enters backward
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.02, 0.05, 0.03],
    "clip_grad": 0.1,
    "adam_eps": 1e-3,
    "lr": 1e-2,
}
SPLIT = {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("options", [{"fp64": True}, {"fp64": False}, {"optimizer": "sgd"}])
def test_a_constant_scale_of_a_power_of_two_changes_no_bit(options):
    assert_same_bits(*(run_layout(1, **EXACT, **options, loss_scale=s) for s in (None, SCALE)))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, SPLIT),
        pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"use_distributed_optimizer": True}, marks=pytest.mark.slow),
        pytest.param(2, {"use_torch_fsdp2": True}, marks=pytest.mark.slow),
        pytest.param(2, {"context_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_constant_scale_changes_no_bit_in_a_layout_either(ranks, layout):
    plain, scaled = (run_layout(ranks, **EXACT, **layout, loss_scale=s) for s in (None, SCALE))
    assert_same_bits(plain, scaled)


def test_any_constant_scale_is_taken_out_again():
    plain, scaled = (run_layout(1, **EXACT, loss_scale=s) for s in (None, 1000.0))
    for one, other in zip(plain.steps, scaled.steps, strict=True):
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-12)
        for key, weight in one.weights.items():
            torch.testing.assert_close(other.weights[key], weight, rtol=1e-10, atol=1e-12)


def assert_same_bits(plain: LayoutResult, scaled: LayoutResult) -> None:
    for one, other in zip(plain.steps, scaled.steps, strict=True):
        assert (one.lm_loss, one.grad_norm) == (other.lm_loss, other.grad_norm)
        for what in ("weights", "gradients"):
            for key, tensor in getattr(one, what).items():
                found = getattr(other, what)[key]
                if what == "gradients" and not torch.equal(found, tensor):
                    found = found / SCALE  # a compiled step divides on the way, not in the buffer
                assert torch.equal(found, tensor), f"{what} of {key}"


class Steps(NamedTuple):
    """What a short run in fp16 did."""

    outcomes: list[tuple[float, float, float, bool]]
    """Loss, norm, next loss scale, and whether the update was made, step by step."""
    changed: list[set[str]]
    """Weights, moments and expert biases that each step changed."""


FP16: dict[str, Any] = {
    "fp64": False,
    "fp16": True,
    "hysteresis": 1,
    "initial_loss_scale": 2.0**22,
    "init_method_std": 0.1,
    "adam_eps": 1e-3,
    "clip_grad": 1.0,
    "lr": 3e-3,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
}


def train(world_size: int, steps: int, **options: Any) -> Steps:
    """Train in fp16; every rank must say the same, to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_train, world_size, Path(folder), steps, FP16 | options)
        ranks = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world_size)]
    assert all(repr(rank[0]) == repr(ranks[0][0]) for rank in ranks), "ranks disagree"
    changed = zip(*(rank[1] for rank in ranks), strict=True)
    return Steps(ranks[0][0], [set().union(*together) for together in changed])


def _train(folder: Path, steps: int, options: dict[str, Any]) -> None:
    run, state = make_run(make_config(**options)), TrainState(dropout_seed=1)
    outcomes, changed = [], []
    before = dict(_state(run))
    for _ in range(steps):
        outcome = train_step(run, state, microbatches(run, state.consumed_samples % 16))
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
        outcomes.append((outcome.lm_loss, outcome.grad_norm, outcome.loss_scale, outcome.updated))
        after = dict(_state(run))
        changed.append({key for key, value in after.items() if not torch.equal(value, before[key])})
        before = after
    torch.save((outcomes, changed), folder / f"{dist.get_rank()}.pt")


def _state(run: Run) -> Iterator[tuple[str, Tensor]]:
    run.model.finish_param_sync()
    for name, param in run.model.trainable_parameters():
        yield f"weight.{name}", param.detach().clone()
    for name, buffer in run.model.module.named_buffers():
        yield f"buffer.{name}", buffer.clone()
    for name, _, tensors in run.optimizer.named_state():
        for kind, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                yield f"{kind}.{name}", tensor.clone()


@functools.cache
def one_process() -> Steps:
    return train(1, 28)


def test_a_run_in_fp16_finds_its_scale_and_learns():
    losses, norms, scales, updated = zip(*one_process().outcomes, strict=True)
    skipped = updated.index(True)
    assert 2 <= skipped <= 8
    assert all(updated[skipped:])
    assert list(scales) == [2.0 ** (22 - min(step + 1, skipped)) for step in range(28)]
    assert all(losses[i] == losses[i - 2] for i in range(2, skipped)), "16 samples, two batches"
    assert sum(losses[-4:]) / 4 < losses[0] - 0.5
    wide = train(1, 1, fp16=False, fp64=True).outcomes[0]
    assert losses[0] == pytest.approx(wide[0], rel=1e-3)
    assert norms[skipped] == pytest.approx(wide[1], rel=0.02)


def test_a_skipped_step_changes_nothing():
    outcomes, changed = one_process()
    kinds = {"weight", "exp_avg", "exp_avg_sq", "main_param", "buffer"}
    for (_, _, _, updated), keys in zip(outcomes, changed, strict=True):
        if updated:
            assert {key.partition(".")[0] for key in keys} == kinds
            assert any(key.endswith("expert_bias") for key in keys)
        else:
            assert keys == set()


@pytest.mark.parametrize("saved_after", [3, 8])
def test_a_run_resumed_in_or_after_the_search_goes_on_bit_for_bit(saved_after, tmp_path):
    run_ranks(_resume, 2, tmp_path, saved_after)


def _resume(folder: Path, saved_after: int) -> None:
    config = make_config(**FP16, loss_scale_window=3, expert_model_parallel_size=2)
    unbroken, state = make_run(config), TrainState(dropout_seed=1)
    _go_on(unbroken, state, saved_after)
    _save(folder, unbroken, state)
    before = unbroken.optimizer.grad_scaler.state_dict()
    assert before["scale"] < 2.0**22
    assert (before["growth_tracker"] > 0) == (saved_after == 8)
    scales = _go_on(unbroken, state, 7)
    resumed = make_run(config)
    loaded = load_checkpoint(
        folder, config=config, model=resumed.model, optimizer=resumed.optimizer
    )
    assert resumed.optimizer.grad_scaler.state_dict() == before
    assert _go_on(resumed, loaded.state(), 7) == scales
    assert len({scale for _, _, scale in scales}) > 1
    found = dict(_state(resumed))
    for key, tensor in _state(unbroken):
        assert torch.equal(found[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"use_distributed_optimizer": True, "expert_model_parallel_size": 2},
        {"use_torch_fsdp2": True},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
    ],
)
def test_what_a_layout_saved_in_fp16_one_process_has_to_the_bit(layout, tmp_path):
    run_ranks(_train_and_save, 2, tmp_path / "of_layout", layout)
    run_ranks(_load_and_save, 1, tmp_path / "of_layout", tmp_path / "of_one")
    one, other = (_stored(tmp_path / name / "iter_0000006") for name in ("of_layout", "of_one"))
    assert one.keys() == other.keys()
    assert sum(key.startswith("optimizer.main_param.") for key in one) > 10
    for key, tensor in one.items():
        assert torch.equal(other[key], tensor), key


def _train_and_save(folder: Path, layout: dict[str, Any]) -> None:
    config = make_config(**FP16, **layout)
    run, state = make_run(config), TrainState(dropout_seed=1)
    _go_on(run, state, 6)
    assert run.optimizer.step_count > 0
    _save(folder, run, state)


def _load_and_save(folder: Path, other: Path) -> None:
    run = make_run(make_config(**FP16))
    loaded = load_checkpoint(folder, config=run.config, model=run.model, optimizer=run.optimizer)
    saved = json.loads((folder / "iter_0000006" / "common.json").read_text())["loss_scale"]
    assert run.optimizer.grad_scaler.state_dict() == saved
    assert saved["scale"] < 2.0**22
    weights = dict(run.model.trainable_parameters())
    for name, _, tensors in run.optimizer.named_state():
        assert torch.equal(weights[name], tensors["main_param"].half()), name
    _save(other, run, loaded.state())


def _save(folder: Path, run: Run, state: TrainState) -> None:
    result = save_checkpoint(
        folder, state, config=run.config, model=run.model, optimizer=run.optimizer
    )
    assert result.path is not None, result.error


def _stored(path: Path) -> dict[str, Tensor]:
    tensors = {
        key: torch.empty(fact.shape, dtype=fact.dtype)
        for key, fact in stored_tensors(path).items()
        if not key.startswith("rng.")
    }
    read_tensors(path, tensors, None, prefixes=("model.", "optimizer."))
    return tensors


def _go_on(run: Run, state: TrainState, steps: int) -> list[tuple[float, str, float]]:
    done = []
    for _ in range(steps):
        outcome = train_step(run, state, microbatches(run, state.consumed_samples))
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
        done.append((outcome.lm_loss, repr(outcome.grad_norm), outcome.loss_scale))
    return done


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, SPLIT | {"use_distributed_optimizer": True}),
        (2, {"tensor_model_parallel_size": 2}),
        pytest.param(2, {"expert_model_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"use_distributed_optimizer": True}, marks=pytest.mark.slow),
        pytest.param(2, {"use_torch_fsdp2": True}, marks=pytest.mark.slow),
        pytest.param(2, {"expert_tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layouts_in_fp16_search_and_step_alike(ranks, layout):
    compare(train(ranks, 12, **layout), one_process())


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"context_parallel_size": 2},
    ],
)
def test_layouts_that_share_tokens_step_alike_at_one_scale(layout):
    # fp16 sums of fewer tokens overflow at twice the scale, so that searches may end elsewhere
    constant = {"loss_scale": 2.0**12}
    compare(train(2, 8, **layout, **constant), train(1, 8, **constant))


def test_the_scale_grows_alike_in_a_layout():
    growing = {"initial_loss_scale": 16.0, "loss_scale_window": 2}
    for ranks, layout in ((1, {}), (4, SPLIT)):
        found = train(ranks, 4, **layout, **growing)
        assert [outcome[2] for outcome in found.outcomes] == [16, 32, 32, 64]


def compare(got: Steps, want: Steps) -> None:
    for step, (mine, theirs) in enumerate(zip(got.outcomes, want.outcomes, strict=False)):
        assert mine[2:] == theirs[2:], f"step {step}"
        assert mine[0] == pytest.approx(theirs[0], rel=1e-3), f"step {step}: loss"
        if mine[3]:
            assert mine[1] == pytest.approx(theirs[1], rel=1e-2), f"step {step}: norm"
