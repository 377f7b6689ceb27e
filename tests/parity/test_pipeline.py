"""R2, R3, R9: a pipeline of stages trains as one process: losses, gradients, norm, weights, counts.

Dropout is on and batches have masks. A stage may have no MoE layer, no layer, or nothing at all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.optimizer import optimizer
from megatron.core.pipeline_parallel import executor
from megatron.core.transformer.moe import moe_logging
from tests.helpers.layouts import LayoutResult, run_layout
from tests.parity.test_layouts import compare

SLOW = pytest.mark.slow
BASE: dict[str, Any] = {"optimizer": "sgd", "num_layers": 4}
UNTIED = {"untie_embeddings_and_output_weights": True}
GLOBAL_BALANCE = {"moe_router_load_balancing_type": ["global_aux_loss"]}
EXPERT_BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
}
QUANTILES = {
    "moe_router_load_balancing_type": ["quantile_balancing"],
    "moe_aux_loss_coeff": None,
    "moe_router_quantile_balancing_ema": 0.25,
}
DENSE_FIRST = {"moe_layer_freq": [0, 0, 0, 1]}
FIVE_ROPE = {
    "num_layers": 5,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "hidden_dropout": 0.0,
}
DENSE = {"num_moe_experts": None, "moe_aux_loss_coeff": None, "moe_z_loss_coeff": None}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": UNTIED,
    "global balance": GLOBAL_BALANCE,
    "expert bias": EXPERT_BIAS,
    "quantiles": QUANTILES,
    "dense first": DENSE_FIRST,
    "five layers": FIVE_ROPE,
    "dense": DENSE,
    "one microbatch": {"global_batch_size": 2},
    "many microbatches": {"global_batch_size": 16},
    "adam": {"optimizer": "adam", "clip_grad": 0.1, "lr": 1e-3},
}


def pipe(size: int, layout: str | None = None, **more: Any) -> dict[str, Any]:
    """Options of ``size`` pipeline ranks."""
    options = {"pipeline_model_parallel_size": size} | more
    return options | ({"pipeline_model_parallel_layout": layout} if layout else {})


TWICE = {"num_virtual_stages_per_pipeline_rank": 2}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 700}
SHARDED = OVERLAP | {"use_distributed_optimizer": True, "overlap_param_gather": True}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "block",
    "recompute_num_layers": 1,
}
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
EP = {"expert_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
ENDS = {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2}

# (model, ranks, layout)
QUICK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "two stages": ("tied", 2, pipe(2)),
    "virtual stages": ("expert bias", 2, pipe(2, **TWICE)),
    "empty stages": ("dense first", 4, pipe(4, "E|tt||ttL")),
    "sequence parallel": ("tied", 4, pipe(2, **SP)),
    "sharded": ("tied", 4, pipe(2, **EP, **SHARDED, **TWICE)),
    "zero bubble": ("untied", 2, pipe(2, pipeline_schedule="zb-h2", **OVERLAP)),
    "dualpipev": ("tied", 4, pipe(2, pipeline_schedule="dualpipev", **EP, **OVERLAP)),
}
WIDE: list[tuple[str, int, dict[str, Any]]] = [
    *[(model, 2, pipe(2, **TWICE)) for model in MODELS if model != "five layers"],
    *[(model, 4, pipe(4)) for model in MODELS if model != "five layers"],
    ("five layers", 3, pipe(3, **ENDS)),
    ("five layers", 4, pipe(2, "Ett|tttL")),
    ("five layers", 2, pipe(2, "E|t|tttt|L")),
    ("five layers", 2, pipe(2, "Etttt|tL")),
    ("tied", 2, pipe(2, "Et|t|t|t||L")),
    ("tied", 2, pipe(2, "Et|tt|t|L")),
    (
        "dense first",
        3,
        pipe(
            3, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
        ),
    ),
    ("untied", 4, pipe(2, **TWICE, **OVERLAP)),
    ("tied", 4, pipe(2, **TWICE, **OVERLAP)),
    ("tied", 2, pipe(2, **TWICE, microbatch_group_size_per_virtual_pipeline_stage=3)),
    ("tied", 2, pipe(2, **TWICE, **FULL)),
    ("tied", 2, pipe(2, recompute_granularity="selective", recompute_modules=["moe"])),
    ("tied", 4, pipe(2, **TP)),
    ("untied", 4, pipe(2, **SP, **TWICE)),
    ("tied", 4, pipe(2, **CP)),
    ("tied", 4, pipe(2, **EP)),
    ("quantiles", 4, pipe(2, **EP, **TWICE)),
    ("adam", 4, pipe(2, **EP, **SHARDED)),
    ("tied", 4, pipe(2, use_distributed_optimizer=True)),
    ("untied", 4, pipe(4, **OVERLAP)),
    *[
        (model, ranks, pipe(ranks, pipeline_schedule=schedule))
        for model in ("tied", "quantiles", "dense", "adam", "one microbatch")
        for schedule in ("zb-h1", "zb-h2", "dualpipev")
        for ranks in ((2,) if schedule == "dualpipev" else (2, 4))
    ],
    *[
        ("tied", 4, pipe(2, pipeline_schedule=schedule, **more))
        for schedule in ("zb-h1", "dualpipev")
        for more in (SP, CP, TP | FULL, EP | SHARDED)
    ],
    ("dense first", 4, pipe(4, "E||t||t|t|t|L", pipeline_schedule="dualpipev")),
    ("many microbatches", 2, pipe(2, "Et||t|ttL", pipeline_schedule="dualpipev")),
    ("tied", 8, pipe(2, **SP, **EP, expert_tensor_parallel_size=1)),
    ("tied", 8, pipe(2, **CP, **TP)),
    ("tied", 8, pipe(4, **EP, **SHARDED)),
]


@functools.cache
def one_process(model: str) -> LayoutResult:
    """The run that all layouts of ``model`` are compared with."""
    return run_layout(1, **(BASE | MODELS[model]))


def check(model: str, ranks: int, layout: dict[str, Any]) -> None:
    """Compare everything that a short run leaves behind."""
    options = BASE | MODELS[model]
    got, want = run_layout(ranks, **options, **layout), one_process(model)
    # Adam divides by the root of tiny second moments: rounding of a gradient is magnified.
    compare(got, want, weights=options["optimizer"] == "sgd")


def name_of(value: object) -> str:
    """Write a layout as a test's name."""
    if not isinstance(value, dict):
        return str(value)
    return "-".join(f"{key}={item}" for key, item in value.items())


@pytest.mark.parametrize("name", QUICK)
def test_a_pipeline_equals_one_process(name: str) -> None:
    check(*QUICK[name])


@SLOW
@pytest.mark.parametrize(("model", "ranks", "layout"), WIDE, ids=name_of)
def test_every_pipeline_equals_one_process(model: str, ranks: int, layout: dict[str, Any]) -> None:
    check(model, ranks, layout)


@SLOW
def test_counts_of_earlier_microbatches_are_those_of_data_ranks_without_stages() -> None:
    # which microbatches are earlier depends on the data ranks, so one process is no measure
    options = BASE | GLOBAL_BALANCE
    want = run_layout(2, **options, **EP)
    compare(run_layout(4, **options, **EP, **pipe(2, **TWICE)), want, weights=True)


@SLOW
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_a_pipeline_gives_the_same_bits_twice(schedule: str) -> None:
    layout = pipe(2, **TWICE, **EP, **SHARDED, pipeline_schedule=schedule)
    one, two = (run_layout(4, **BASE, **layout, steps=20) for _ in range(2))
    for first, second in zip(one.steps, two.steps, strict=True):
        assert (first.lm_loss, first.grad_norm) == (second.lm_loss, second.grad_norm)
        assert all(torch.equal(second.weights[key], first.weights[key]) for key in first.weights)


def test_bf16_goes_down_as_on_one_process() -> None:
    options = BASE | {"fp64": False, "bf16": True, "optimizer": "adam", "lr": 3e-3}
    got = run_layout(2, **options, **pipe(2, **TWICE), steps=4)
    want = run_layout(1, **options, steps=4)
    mine, theirs = ([step.lm_loss for step in run.steps] for run in (got, want))
    assert mine == pytest.approx(theirs, rel=2e-3)
    assert mine[-1] < mine[0]


def _copies_summed_apart(patch: pytest.MonkeyPatch) -> None:
    right = DistributedDataParallel._group
    patch.setattr(
        DistributedDataParallel,
        "_group",
        lambda self, key: right(self, key._replace(tied_ends="no")),
    )


def _copy_counted_twice(patch: pytest.MonkeyPatch) -> None:
    right = optimizer.owned_gradients
    patch.setattr(
        optimizer,
        "owned_gradients",
        lambda found, groups: right(
            [(key._replace(tied_ends="no"), flat) for key, flat in found], groups
        ),
    )


def _norm_of_one_stage(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer, "global_grad_norm", _norm_here)


def _norm_here(gradients: Any, device: torch.device, **_: Any) -> torch.Tensor:
    flats = [flat for _, found in gradients for flat in found]
    return torch.stack([flat.square().sum() for flat in flats]).sum().sqrt()


def _reduced_at_every_backward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(executor, "_last_backwards", lambda steps: frozenset(steps))


def _report_of_one_stage(patch: pytest.MonkeyPatch) -> None:
    right = moe_logging.MoEMetricsTracker.report
    patch.setattr(
        moe_logging.MoEMetricsTracker,
        "report",
        lambda self, groups: right(self, _without_stages(groups)),
    )


def _without_stages(groups: Any) -> Any:
    return dataclasses.replace(groups, pp=groups.cp)


@pytest.mark.parametrize(
    ("plant", "model", "wrong"),
    [
        (_copies_summed_apart, "tied", "replicas of embedding"),
        (_copy_counted_twice, "tied", "grad_norm"),
        (_norm_of_one_stage, "untied", "ranks disagree"),
        (_reduced_at_every_backward, "untied", "after its bucket was reduced"),
        (_report_of_one_stage, "untied", None),
    ],
)
def test_a_planted_bug_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None],
    model: str,
    wrong: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_process(model)  # before the bug is there
    plant(monkeypatch)
    with pytest.raises(Exception, match=wrong):
        check(model, 2, pipe(2, **OVERLAP))
