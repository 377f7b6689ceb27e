"""ZeRO-3 (--use-torch-fsdp2) equals one process, and keeps 1 / n of weights, gradients, moments."""

import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    TorchFullyShardedDataParallel,
)
from megatron.core.optimizer import fully_sharded_optimizer
from megatron.training.evaluate import evaluate
from megatron.training.run import TrainState
from tests.helpers.layouts import LayoutResult, make_config, make_run, microbatches, run_layout
from tests.helpers.ranks import run_ranks
from tests.helpers.train_steps import train_steps
from tests.parity.test_layouts import CASES, assert_equal, check_layout

FSDP = {"use_torch_fsdp2": True}
PAIRS = [(2, 1), (4, 1), (4, 2), (4, 4)]  # (ranks, expert parallel)
QUICK = [("alltoall", 4, 2), ("dense_first", 2, 1), ("chunks", 4, 1)]
ALL = [(case, *pair) for case in CASES for pair in PAIRS if case != "overlap"]
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in QUICK]
ADAM = {
    "optimizer": "adam",
    "lr": 1e-2,
    "adam_eps": 1e-3,  # well above rounding: Adam divides tiny gradients by their size
    "clip_grad": 0.1,
    "weight_decay": 0.1,
}


@pytest.mark.parametrize(("case", "world_size", "ep"), [*QUICK, *SLOW])
def test_layout_equals_one_process(
    case: str, world_size: int, ep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"overlap_grad_reduce", "bucket_size"}  # of the other class; change no sum
    options = {name: value for name, value in CASES[case].items() if name not in plain}
    monkeypatch.setitem(CASES, case, options)
    check_layout(case, world_size, expert_model_parallel_size=ep, **FSDP)


RECOMPUTED: dict[str, dict[str, Any]] = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full of both layers": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "gathered once": {"torch_fsdp2_no_reshard_after_forward": True},
}


def sharded(world_size: int, **options: Any) -> LayoutResult:
    """Train three steps of Adam, fully sharded."""
    return run_layout(world_size, steps=3, **(ADAM | FSDP | options))


@functools.cache
def one_process() -> LayoutResult:
    """The same steps in one process."""
    return run_layout(1, steps=3, **ADAM)


def compare(got: LayoutResult, want: LayoutResult) -> None:
    """Compare every step to 1e-12, first weights to the bit."""
    assert got.initial.keys() == want.initial.keys(), "not the tensors of the model"
    assert all(torch.equal(got.initial[key], tensor) for key, tensor in want.initial.items())
    for step, (mine, theirs) in enumerate(zip(got.steps, want.steps, strict=True)):
        assert mine.lm_loss == pytest.approx(theirs.lm_loss, rel=1e-12), f"step {step}: loss"
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-12), f"step {step}: norm"
        assert_equal(mine.weights, theirs.weights, f"step {step}: weight")


def assert_same_bits(got: LayoutResult, want: LayoutResult) -> None:
    """Compare losses, norms and weights of all steps, to the bit."""
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert (mine.lm_loss, mine.grad_norm) == (theirs.lm_loss, theirs.grad_norm)
        assert all(torch.equal(mine.weights[key], theirs.weights[key]) for key in theirs.weights)


def test_adam_and_clipping_equal_one_process() -> None:
    got = sharded(4, expert_model_parallel_size=2)
    compare(got, one_process())
    assert_same_bits(sharded(4, expert_model_parallel_size=2), got)  # and twice the same


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_adam_on_any_number_of_ranks(world_size: int) -> None:
    sizes = {"global_batch_size": 12} if world_size == 3 else {}  # 8 experts over 3: another dim
    want = run_layout(1, steps=3, **(ADAM | sizes)) if sizes else one_process()
    compare(sharded(world_size, **sizes), want)


@pytest.mark.parametrize(
    "case", ["moe", *(pytest.param(c, marks=pytest.mark.slow) for c in RECOMPUTED if c != "moe")]
)
def test_computing_again_changes_no_bit(case: str) -> None:
    layout = {"expert_model_parallel_size": 2}
    assert_same_bits(sharded(2, **layout, **RECOMPUTED[case]), sharded(2, **layout))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "ep"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
def test_context_parallelism_equals_one_process(world_size: int, ep: int, kind: str) -> None:
    sizes = {"context_parallel_size": 2, "expert_model_parallel_size": ep}
    compare(sharded(world_size, cp_comm_type=[kind], **sizes), one_process())


BF16 = {"fp64": False, "bf16": True, "lr": 1e-3, "adam_eps": 1e-8}


def test_bf16_follows_the_plain_optimizer() -> None:
    """Both begin with equal bits; gradients are rounded at other places."""
    got = sharded(2, **BF16)
    want = run_layout(2, steps=3, **(ADAM | BF16))
    for key, weight in want.initial.items():
        assert torch.equal(got.initial[key], weight), key
    for mine, theirs in zip(got.steps, want.steps, strict=True):
        assert mine.lm_loss == pytest.approx(theirs.lm_loss, rel=2e-3)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)
        for key, weight in theirs.weights.items():
            error = (mine.weights[key].float() - weight.float()).abs().max().item()
            assert error <= 2**-7 * weight.abs().max().item() + 2e-3, f"{key}: {error}"


def _main_weights(options: dict[str, Any]) -> None:
    run = make_run(make_config(**options))
    assert isinstance(run.model, TorchFullyShardedDataParallel)
    kept = [shard.weight for shard in run.model.shards]
    assert all(weight.dtype == torch.float32 for weight in kept)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in kept), "drawn in bf16"
    train_steps(run, TrainState(), 1)
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in kept)


def test_main_weights_begin_rounded_and_are_not_rounded_again() -> None:
    run_ranks(_main_weights, 2, ADAM | FSDP | BF16)


def _kept(options: dict[str, Any], folder: str) -> None:
    """Count the bytes of all tensors that a run of two steps leaves alive."""
    before = _alive()
    run = make_run(make_config(**options))
    train_steps(run, TrainState(dropout_seed=run.config.training.seed), 2)
    gc.collect()
    after = _alive()
    kept = sum(size for key, size in after.items() if key not in before)
    weights = sum(param.numel() for _, param in run.model.trainable_parameters())
    torch.save((kept, weights), Path(folder) / f"{dist.get_rank()}.pt")


def _alive() -> dict[int, int]:
    found = (x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter))
    storages = [x.untyped_storage() for x in found if x.is_floating_point()]
    return {storage._cdata: storage.nbytes() for storage in storages}


WIDE = {"hidden_size": 64, "ffn_hidden_size": 128, "num_moe_experts": 8}


@pytest.mark.parametrize(("ranks", "ep"), [(2, 1), (4, 2)])
def test_a_rank_keeps_its_share_and_no_more(tmp_path: Path, ranks: int, ep: int) -> None:
    options = ADAM | WIDE | FSDP | {"fp64": False, "expert_model_parallel_size": ep}
    run_ranks(_kept, ranks, options, str(tmp_path))
    for rank in range(ranks):
        kept, weights = torch.load(tmp_path / f"{rank}.pt")
        whole = 4 * 4 * weights  # weight, gradient, two moments, in fp32; experts of this EP rank
        experts = 4 * 4 * 2 * 8 // ep * (3 * 64 * 128 + 2 * 128 + 64)
        share = (whole - experts) / ranks + experts / (ranks / ep)
        assert share <= kept <= 1.03 * share, f"rank {rank}: {kept} bytes, share {share}"


def _gathered(options: dict[str, Any]) -> None:
    """See, while the second layer computes, whether the first is whole."""
    run = make_run(make_config(**options))
    layers, seen = run.model.module.decoder.layers, []

    def look(*_: Any) -> None:
        seen.append([isinstance(p, DTensor) for p in layers["0"].parameters()])
        assert not any(isinstance(p, DTensor) for p in layers["1"].input_layernorm.parameters())

    layers["1"].input_layernorm.register_forward_hook(look)
    train_steps(run, TrainState(), 1)
    assert len(seen) == run.num_microbatches
    assert all(all(one) is not run.config.ddp.torch_fsdp2_no_reshard_after_forward for one in seen)


@pytest.mark.parametrize("stays", [False, True])
def test_a_layer_is_let_go_after_forward_unless_asked_for(stays: bool) -> None:
    run_ranks(_gathered, 2, FSDP | {"torch_fsdp2_no_reshard_after_forward": stays})


def _evaluated(options: dict[str, Any]) -> None:
    """Evaluation between steps changes nothing, and sees the weights of the last step."""
    config = make_config(**options)
    runs = [make_run(config), make_run(config)]
    states = [TrainState(), TrainState()]
    for run, state in zip(runs, states, strict=True):
        train_steps(run, state, 1)
    for _ in range(2):
        losses = [evaluate(run, microbatches(run, 64), 1) for run in runs]
        assert losses[0] == losses[1]
        assert train_steps(runs[0], states[0], 1) == train_steps(runs[1], states[1], 1)
        evaluate(runs[0], microbatches(runs[0], 80), 1)
    plain = make_run(make_config(**(options | dict.fromkeys(FSDP, False))))
    train_steps(plain, TrainState(), 3)
    want = evaluate(plain, microbatches(plain, 64), 1)
    assert evaluate(runs[0], microbatches(runs[0], 64), 1) == pytest.approx(want, rel=1e-10)


def test_evaluation_reads_the_weights_and_changes_nothing() -> None:
    run_ranks(_evaluated, 2, ADAM | FSDP)


def _skips(options: dict[str, Any]) -> None:
    run = make_run(make_config(**options))
    assert isinstance(run.model, TorchFullyShardedDataParallel)
    before = [shard.weight.clone() for shard in run.model.shards]
    bad = next(s for s in run.model.shards if s.role.is_expert)
    run.model.zero_grad_buffer()
    if dist.get_rank() == 1:
        bad.gradient.view(-1)[-1] = float("nan")
    run.model.finish_grad_sync()
    assert not run.optimizer.step().update_successful
    assert run.optimizer.step_count == 0
    assert run.model.nonfinite_gradients() == [bad.name]
    for shard, old in zip(run.model.shards, before, strict=True):
        assert torch.equal(shard.weight, old)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_all(optimizer: str) -> None:
    run_ranks(_skips, 2, FSDP | {"optimizer": optimizer})


def _means(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


def _norm_of_own_shards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fully_sharded_optimizer, "sum_over_ranks", lambda own, group: own)


def _experts_over_all_data_ranks(patch: pytest.MonkeyPatch) -> None:
    def group(self: TorchFullyShardedDataParallel, is_expert: bool) -> Any:
        return self.pg_collection.dp_cp

    patch.setattr(TorchFullyShardedDataParallel, "_group", group)


@pytest.mark.parametrize(
    ("plant", "wrong"),
    [
        (_means, "step 0: norm"),
        (_norm_of_own_shards, "ranks disagree"),
        (_experts_over_all_data_ranks, "not the tensors of the model"),
    ],
)
def test_a_planted_bug_is_seen(plant: Any, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = one_process()  # before the bug is there
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=wrong):
        compare(sharded(4, expert_model_parallel_size=2), want)
