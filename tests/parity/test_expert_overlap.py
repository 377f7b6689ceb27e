"""--overlap-moe-expert-parallel-comm: the bits of a run without it, on every rank, in every step.

And the ranks agree: each issues the same collectives in the same order, and rows that one sends
the other expects.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from tests.helpers.collective_log import Issued, assert_ranks_agree, logged_collectives
from tests.helpers.layouts import make_config, make_run, microbatches, run_layout
from tests.helpers.ranks import run_ranks

SLOW = pytest.mark.slow
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
LATE_WEIGHTS = OVERLAP | {"delay_wgrad_compute": True}
SHARED = {"moe_shared_expert_intermediate_size": 20, "moe_shared_expert_gate": True}
CASES: dict[str, dict[str, Any]] = {
    "alltoall": {"moe_layer_freq": [0, 1, 1], "num_layers": 3, "overlap_grad_reduce": True},
    "dedup": {"moe_token_dispatcher_type": "alltoall_dedup", "moe_router_topk": 4} | SHARED,
    "hierarchical": {
        "moe_token_dispatcher_type": "alltoall_hierarchical",
        "moe_dispatcher_node_size": 2,
    },
    "shared_experts_meanwhile": SHARED | {"moe_shared_expert_overlap": True},
    "chunks": {"moe_expert_chunk_tokens": 5},
    "recomputed_layers": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recomputed_experts": SHARED
    | {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]},
    "balance_of_the_step": {
        "moe_router_load_balancing_type": ["global_aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.05, 0.02],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
    },
    "all_rows_to_one_rank": {"moe_router_force_biased": 1000.0},
    "capacity_bf16": {
        "fp64": False,
        "bf16": True,
        "moe_expert_capacity_factor": 0.5,
        "moe_pad_expert_input_to_capacity": True,
    },
    "sharded_adam": {
        "optimizer": "adam",
        "clip_grad": 0.1,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "bucket_size": 700,
    },
    "sliced_experts": {"expert_tensor_parallel_size": 2},
}
STAGES = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
V = {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev"}
REST = [case for case in CASES if case != "alltoall"]
QUICK = [("alltoall", 2, 2, 3), ("dedup", 4, 4, 2), ("balance_of_the_step", 2, 2, 4)]
WIDE = [
    (case, ranks, ep, microbatches)
    for case in CASES
    for ranks, ep in ((2, 2), (4, 2), (4, 4))
    for microbatches in (2, 4)
    if ranks >= ep * CASES[case].get("expert_tensor_parallel_size", 1)
]


def _options(case: str, ranks: int, ep: int, num_microbatches: int, **more: Any) -> dict[str, Any]:
    data_ranks = ranks // more.get("pipeline_model_parallel_size", 1)
    sizes = {
        "expert_model_parallel_size": ep,
        "global_batch_size": 2 * data_ranks * num_microbatches,
    }
    return {"optimizer": "sgd"} | sizes | CASES[case] | more


def check_same_bits(
    case: str,
    ranks: int,
    ep: int,
    num_microbatches: int,
    *,
    overlap: dict[str, bool] = OVERLAP,
    **more: Any,
) -> None:
    """Compare three steps with those of the run without overlap."""
    options = _options(case, ranks, ep, num_microbatches, **more)
    want = run_layout(ranks, steps=3, **options)
    got = run_layout(ranks, steps=3, **options, **overlap)
    assert torch.equal(got.tokens_per_expert, want.tokens_per_expert)
    assert got.metrics == want.metrics
    for mine, plain in zip(got.steps, want.steps, strict=True):
        assert (mine.lm_loss, mine.grad_norm) == (plain.lm_loss, plain.grad_norm)
        for kind in ("gradients", "weights"):
            one, other = getattr(mine, kind), getattr(plain, kind)
            assert one.keys() == other.keys()
            differ = [name for name in one if not torch.equal(one[name], other[name])]
            assert not differ, f"{kind} of {differ}"


@pytest.mark.parametrize(("case", "ranks", "ep", "num_microbatches"), QUICK)
def test_overlap_changes_no_bit(case, ranks, ep, num_microbatches):
    check_same_bits(case, ranks, ep, num_microbatches)


@pytest.mark.parametrize("case", ["alltoall", *(pytest.param(c, marks=SLOW) for c in REST)])
def test_late_weight_gradients_change_no_bit(case):
    ranks = 2 * CASES[case].get("expert_tensor_parallel_size", 1)
    check_same_bits(case, ranks, 2, 3, overlap=LATE_WEIGHTS)


@SLOW
@pytest.mark.parametrize("stages", [STAGES, V], ids=["interleaved", "dualpipev"])
@pytest.mark.parametrize("case", ["balance_of_the_step", "sharded_adam"])
def test_late_weight_gradients_of_a_pipeline_change_no_bit(case, stages):
    check_same_bits(case, 4, 2, 4, num_layers=4, overlap=LATE_WEIGHTS, **stages)


@pytest.mark.parametrize("num_microbatches", [3, pytest.param(8, marks=SLOW)])
@pytest.mark.parametrize("stages", [STAGES, V], ids=["interleaved", "dualpipev"])
def test_pairs_of_a_pipeline_change_no_bit(stages, num_microbatches):
    check_same_bits("balance_of_the_step", 4, 2, num_microbatches, num_layers=4, **stages)


@SLOW
@pytest.mark.parametrize("stages", [STAGES, V], ids=["interleaved", "dualpipev"])
@pytest.mark.parametrize("case", REST)
def test_pairs_of_a_pipeline_change_no_bit_in_any_case(case, stages):
    slices = CASES[case].get("expert_tensor_parallel_size", 1)
    check_same_bits(case, 4 * slices, 2, 4, num_layers=4, **stages)


@SLOW
@pytest.mark.parametrize(("case", "ranks", "ep", "num_microbatches"), WIDE)
def test_overlap_changes_no_bit_in_any_layout(case, ranks, ep, num_microbatches):
    check_same_bits(case, ranks, ep, num_microbatches)


def _log_of_a_step(options: dict[str, Any]) -> tuple[int, list[Issued]]:
    """Return the stage of this rank, and what it issues in a step after the first."""
    run = make_run(make_config(**options))
    train_step(run, TrainState(dropout_seed=1), microbatches(run, 0))
    with logged_collectives() as log:
        train_step(run, TrainState(dropout_seed=1), microbatches(run, 0))
    return run.world.pg_collection.pp.rank(), log


def _ranks_agree(options: dict[str, Any]) -> None:
    (stage, mine), (_, plain) = _log_of_a_step(options | OVERLAP), _log_of_a_step(options)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (stage, mine))
    assert_ranks_agree([log for _, log in found])
    # over all its groups, too, a rank does what the others of its stage do
    programs = {tuple(issued.kind for issued in log) for other, log in found if other == stage}
    assert len(programs) == 1
    assert sum(issued.op == "all_to_all_single" for issued in mine) >= 30
    # the same collectives as without, in another order: two microbatches are mixed
    assert sorted(mine) == sorted(plain)
    assert mine != plain


@pytest.mark.parametrize("case", ["alltoall", "dedup"])
def test_every_rank_issues_the_same_collectives_in_one_order(case):
    run_ranks(_ranks_agree, 4, _options(case, 4, 4 if case == "dedup" else 2, 3))


def test_every_rank_of_a_pipeline_issues_one_order():
    run_ranks(_ranks_agree, 4, _options("dedup", 4, 2, 4, num_layers=4, **STAGES))


@SLOW
@pytest.mark.parametrize("case", CASES)
def test_ranks_issue_one_order_in_every_case(case):
    run_ranks(_ranks_agree, 4, _options(case, 4, 2, 3))


def test_a_rank_that_sends_otherwise_is_seen():
    call = Issued("all_to_all_single", (0, 1), "torch.float64", (4,), (1, 2), (1, 3))
    other = call._replace(send=(3, 1), recv=(2, 1))
    assert_ranks_agree([[call], [other]])
    for wrong in ([other, other], [other._replace(row=(5,))], [other._replace(recv=(1, 1))]):
        with pytest.raises(AssertionError, match=r"\(0, 1\)"):
            assert_ranks_agree([[call], wrong])
