"""R1-R4: experts beside tensor parallelism equal one process, whatever the expert grid.

Tensor-parallel ranks route shares of the sequence; the expert grid lies over all ranks. Padding,
dropout and every balance loss are on where a case does not say otherwise.
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors, write_tensors
from megatron.core.dist_checkpointing.tensor_shards import Storable
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.microbatch_share import MicrobatchShare
from tests.helpers.layouts import LayoutResult, make_batch, make_config, make_run, run_layout
from tests.helpers.ranks import run_ranks
from tests.parity.test_layouts import CASES as EXPERT_CASES
from tests.parity.test_layouts import compare
from tests.unit_tests.core.dist_checkpointing.stand_in import clear, fill, wrong_keys

BASE = {"num_attention_heads": 4, "optimizer": "sgd"}
ALL_LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.02, 0.05, 0.03],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
    "moe_shared_expert_intermediate_size": 20,
    "moe_shared_expert_gate": True,
    "moe_latent_size": 10,
}
CASES = {name: EXPERT_CASES[name] for name in EXPERT_CASES if name != "adam_clipped"} | {
    "all_losses": ALL_LOSSES,
    "all_losses_dedup": ALL_LOSSES
    | {"moe_token_dispatcher_type": "alltoall_dedup", "moe_router_topk": 4},
    "all_losses_allgather": ALL_LOSSES | {"moe_token_dispatcher_type": "allgather"},
    "adam_clipped": EXPERT_CASES["adam_clipped"],
}
FEW = [(2, 2, 2, 1), (4, 2, 2, None)]  # (ranks, TP, EP, ETP)
GRIDS = [*FEW, (2, 2, 1, None), (4, 2, 2, 1), (4, 2, 1, 2), (4, 4, 2, 1), (4, 4, 1, None)]
GRID_CASES = ["all_losses", "all_losses_dedup", "all_losses_allgather"]


def padded_batch(sample_ids: range):
    """Samples whose last positions are padding: none of sample 0, all of sample 5 of each 8."""
    batch = make_batch(sample_ids)
    length = batch.tokens.shape[1]
    lengths = torch.tensor([[12, 9, 3, 12, 7, 0, 6, 11][number % 8] for number in sample_ids])
    padding = torch.arange(length) >= lengths.unsqueeze(1)
    return replace(batch, padding_mask=padding, loss_mask=batch.loss_mask * ~padding)


@functools.cache
def reference(case: str, padded: bool, ranks: int = 1) -> LayoutResult:
    """The run that all layouts of ``case`` are compared with.

    ``ranks`` share the samples: a global balance loss sees the step so far, which depends on that.
    """
    return run_layout(ranks, batch_of=padded_batch if padded else None, **(BASE | CASES[case]))


def check(
    case: str, grid: tuple[int, int, int, int | None], shared: bool, *, padded: bool = False
) -> None:
    """Compare a layout with one process in everything that a short run leaves behind."""
    world_size, tp, ep, etp = grid
    got = run_layout(
        world_size,
        batch_of=padded_batch if padded else None,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=shared,
        **(BASE | CASES[case]),
    )
    data_ranks = world_size // tp if case in GRID_CASES else 1
    compare(got, reference(case, padded, data_ranks), weights=case != "adam_clipped")


@pytest.mark.parametrize("grid", FEW)
@pytest.mark.parametrize("shared", [False, True])
def test_experts_beside_tensor_parallelism_equal_one_process(grid, shared):
    check("all_losses", grid, shared, padded=grid == FEW[0])


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", GRID_CASES)
def test_every_grid_equals_one_process(case, grid, shared):
    check(case, grid, shared)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_feature_equals_one_process(case, shared):
    check(case, (4, 2, 2, 1), shared)


@pytest.mark.parametrize("case", ["expert_choice", "capacity_padded"])
def test_choices_over_a_microbatch_equal_one_process(case):
    check(case, (2, 2, 2, 1), True)


GRID_OF_CHECKPOINT = {1: (1, 1, None), 2: (2, 2, 1), 4: (2, 2, 2)}  # ranks -> TP, EP, ETP


def _tensors(world_size: int) -> dict[str, Storable]:
    tp, ep, etp = GRID_OF_CHECKPOINT[world_size]
    grid = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "sequence_parallel": tp > 1,
    }
    options = BASE | ALL_LOSSES | {"optimizer": "adam", "moe_layer_freq": [0, 1]}
    run = make_run(make_config(**options, **grid))
    return model_tensors(run.model.module) | optimizer_tensors(run.optimizer.named_state())


def _save(folder: str, world_size: int) -> None:
    tensors = _tensors(world_size)
    fill(tensors)
    write_tensors(Path(folder), tensors, dist.group.WORLD)


def _load(folder: str, world_size: int) -> None:
    tensors = _tensors(world_size)
    clear(tensors)
    read_tensors(Path(folder), tensors, dist.group.WORLD, prefixes=("model.", "optimizer."))
    assert wrong_keys(tensors) == []


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1), (4, 1), (2, 4)])
def test_weights_and_moments_fit_any_grid(tmp_path, saved, loaded):
    run_ranks(_save, saved, str(tmp_path), saved)
    run_ranks(_load, loaded, str(tmp_path), loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["alltoall", "capacity", "expert_choice", "sinkhorn", "quantile_balancing", "hash"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_padding_equals_one_process(case, shared):
    check(case, (4, 2, 2, 1), shared, padded=True)


def _balance_of_own_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MicrobatchShare, "total", lambda self, x: x * self.ranks)


def _routers_that_learn_from_their_share(patch: pytest.MonkeyPatch) -> None:
    def group(self, key):
        groups = self.pg_collection
        return groups.expt_dp if key.is_expert else groups.dp_cp

    patch.setattr(DistributedDataParallel, "_group", group)


def _padding_of_the_first_share(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        moe_layer,
        "_own_columns",
        lambda x, tp: None if x is None else x.chunk(tp.size(), dim=1)[0],
    )


def _whole_gradient_of_outputs(patch: pytest.MonkeyPatch) -> None:
    right = moe_layer.gather_sequence

    def doubled(group, x):
        return right(group, x * 2 - x.detach())  # gradients of all ranks summed

    patch.setattr(moe_layer, "gather_sequence", doubled)


@pytest.mark.parametrize(
    ("plant", "shared"),
    [
        (_balance_of_own_tokens, True),
        (_routers_that_learn_from_their_share, True),
        (_padding_of_the_first_share, True),
        (_whole_gradient_of_outputs, False),
    ],
)
def test_a_planted_bug_is_seen(plant, shared, monkeypatch):
    reference("all_losses", True)  # before the bug is there
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"step [01]: (lm_loss|grad_norm)|replicas|gradient"):
        check("all_losses", FEW[0], shared, padded=True)
