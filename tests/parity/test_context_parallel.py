"""R1, R2: sequences shared over ranks train as on one process; checkpoints fit any share."""

import functools
from dataclasses import replace

import pytest
import torch

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.models.gpt import gpt_model
from megatron.core.sequence_slices import take_own
from megatron.core.tensor_parallel.random import SequenceShare
from megatron.core.transformer.blocked_attention import WeightDropout
from megatron.training import train_step
from megatron.training.datasets import batch
from megatron.training.datasets.batch import Batch
from tests.helpers.layouts import VOCAB, LayoutResult, run_layout
from tests.parity.test_layouts import compare
from tests.parity.test_tensor_parallel import DENSE as DENSE_OF_TP

LENGTH = 16
DENSE = DENSE_OF_TP | {"seq_length": LENGTH, "max_position_embeddings": LENGTH}
CASES = {
    "learned_positions": {},
    "groups_rope": {
        "group_query_attention": True,
        "num_query_groups": 2,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
    },
}
SLOW = pytest.mark.slow
KINDS = ["p2p", "all_gather", "a2a"]


def make_batch(sample_ids: range, *, documents: bool = False) -> Batch:
    """Make samples from their numbers, with uneven masks; or with two documents each.

    Of those none of the second looks at the first, and its positions begin anew.
    """
    ids = torch.empty(len(sample_ids), LENGTH + 1, dtype=torch.int64)
    loss_mask = torch.empty(len(sample_ids), LENGTH)
    hidden = torch.zeros(len(sample_ids), 1, LENGTH, LENGTH, dtype=torch.bool)
    positions = torch.arange(LENGTH).repeat(len(sample_ids), 1)
    for row, number in enumerate(sample_ids):
        generator = torch.Generator().manual_seed(number)
        ids[row] = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        loss_mask[row] = (
            torch.rand(LENGTH, generator=generator) < 0.2 + 0.1 * (number % 8)
        ).float()
        if documents:
            border = 1 + (5 * number) % (LENGTH - 1)
            hidden[row, :, border:, :border] = True
            positions[row, border:] -= border
    return Batch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=loss_mask,
        position_ids=positions,
        attention_mask=hidden if documents else None,
        sample_ids=tuple(sample_ids),
    )


@functools.cache
def one_process(case: str, masked: bool = False) -> LayoutResult:
    """The run that all layouts of ``case`` are compared with."""
    batch_of = functools.partial(make_batch, documents=masked)
    return run_layout(1, batch_of=batch_of, **(DENSE | CASES[case]))


def check(
    case: str,
    kind: str,
    ranks: int = 2,
    cp: int = 2,
    tp: int = 1,
    shared: bool = False,
    masked: bool = False,
    **more: object,
) -> None:
    """Compare everything that a short run leaves behind."""
    layout = {
        "context_parallel_size": cp,
        "cp_comm_type": [kind],
        "tensor_model_parallel_size": tp,
        "sequence_parallel": shared,
    }
    batch_of = functools.partial(make_batch, documents=masked)
    got = run_layout(ranks, batch_of=batch_of, **layout, **(DENSE | CASES[case] | more))
    compare(got, one_process(case, masked), weights=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_of_a_sequence_equal_one_process(case, kind):
    check(case, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_kept_apart_over_ranks(kind):
    check("learned_positions", kind, masked=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [pytest.param("learned_positions", marks=SLOW), "groups_rope"])
def test_four_ranks_of_a_sequence_equal_one_process(case, kind):
    check(case, kind, ranks=4, cp=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tp", "shared"),
    [pytest.param(1, False, marks=SLOW), pytest.param(2, False, marks=SLOW), (2, True)],
)
def test_with_data_or_tensor_parallelism_they_equal_one_process(tp, shared, kind):
    check("groups_rope", kind, ranks=4, tp=tp, shared=shared)


MOE = {
    "num_moe_experts": 8,
    "moe_z_loss_coeff": 1e-3,
    "moe_router_load_balancing_type": ["none"],
    "moe_aux_loss_coeff": None,
}
MOE_CASES = {
    "expert_bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_shared_expert_intermediate_size": 20,
    },
    "jitter": {"moe_input_jitter_eps": 0.1},
    "forced": {"moe_router_force_load_balancing": True},
    "global_balance": {
        "moe_router_load_balancing_type": ["global_aux_loss"],
        "moe_aux_loss_coeff": [0.02],
    },
    "hash": {"moe_router_type": "hash"},
    "balance": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.02, 0.01],
    },
    "capacity": {"moe_expert_capacity_factor": 0.8},
    "first_kept": {"moe_expert_capacity_factor": 0.8, "moe_token_drop_policy": "position"},
    "expert_choice": {"moe_router_type": "expert_choice"},
    "sinkhorn": {"moe_router_load_balancing_type": ["sinkhorn"]},
    "quantiles": {"moe_router_load_balancing_type": ["quantile_balancing"]},
}


QUICK = ("expert_bias", "balance", "first_kept")


@functools.cache
def moe_of_whole_sequences(case: str, ranks: int) -> LayoutResult:
    """The run with as many data ranks, each with whole sequences."""
    return run_layout(ranks, batch_of=make_batch, **(DENSE | MOE | MOE_CASES[case]))


def check_moe(case: str, ranks: int, ep: int, tp: int = 1, *, shared: bool = False) -> None:
    options = DENSE | MOE | MOE_CASES[case] | {"cp_comm_type": ["p2p", "a2a"]}
    layout = {
        "context_parallel_size": 2,
        "expert_model_parallel_size": ep,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": shared,
    }
    got = run_layout(ranks, batch_of=make_batch, **layout, **options)
    compare(got, moe_of_whole_sequences(case, ranks // 2 // tp), weights=True)


@pytest.mark.parametrize(
    "case",
    [
        *QUICK,
        *[pytest.param(case, marks=SLOW) for case in MOE_CASES if case not in QUICK],
    ],
)
def test_experts_over_two_ranks_of_a_sequence_equal_one_process(case):
    check_moe(case, 2, 2)


@SLOW
@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("case", MOE_CASES)
def test_experts_over_ranks_of_two_sequences_equal_two_processes(case, ep):
    check_moe(case, 4, ep)


@SLOW
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "sequence parallel"])
@pytest.mark.parametrize("case", MOE_CASES)
def test_experts_over_tensor_and_context_ranks_equal_one_process(case, shared):
    check_moe(case, 4, 2, 2, shared=shared)


def _rotary_positions_from_0(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpt_model, "own_ranges", lambda length, rank, ranks: (range(length // ranks),))


def _mask_of_the_first_rows(patch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, rank: int, ranks: int, *, dim: int) -> torch.Tensor:
        return x[:, :, : LENGTH // ranks] if dim == 2 else take_own(x, rank, ranks, dim=dim)

    patch.setattr(batch, "take_own", wrong)


def _tokens_of_this_slice_only(patch: pytest.MonkeyPatch) -> None:
    right = train_step.count_tokens

    def wrong(batches, world):
        groups = replace(world.pg_collection, dp_cp=world.pg_collection.dp)
        return right(batches, replace(world, pg_collection=groups))

    patch.setattr(train_step, "count_tokens", wrong)


def _dropout_by_local_position(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SequenceShare, "of", lambda self, whole: whole.chunk(self.cp_ranks)[0])


def _dropped_weights_by_local_head(patch: pytest.MonkeyPatch) -> None:
    right = WeightDropout.kept
    patch.setattr(
        WeightDropout,
        "kept",
        lambda self, *args, **names: right(self._replace(first_head=0), *args, **names),
    )


def _gradients_of_this_slice_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DistributedDataParallel, "_group", lambda self, key: self.pg_collection.dp)


PLANTS = {
    "rotary": (_rotary_positions_from_0, "groups_rope", "p2p"),
    "mask": (_mask_of_the_first_rows, "learned_positions", "all_gather"),
    "count": (_tokens_of_this_slice_only, "learned_positions", "p2p"),
    "dropout": (_dropout_by_local_position, "learned_positions", "p2p"),
    "weights": (_dropped_weights_by_local_head, "learned_positions", "a2a"),
    "gradients": (_gradients_of_this_slice_only, "learned_positions", "p2p"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_seen(plant, monkeypatch):
    bug, case, kind = PLANTS[plant]
    masked = plant == "mask"
    one_process(case, masked)  # before the bug is there
    bug(monkeypatch)
    with pytest.raises(AssertionError, match=r"step 0: (lm_loss|grad_norm)|replicas|disagree"):
        check(case, kind, masked=masked)


@pytest.mark.parametrize("kind", ["p2p", *[pytest.param(k, marks=SLOW) for k in KINDS[1:]]])
def test_recomputed_attention_over_ranks_equals_one_process(kind):
    check("groups_rope", kind, recompute_granularity="selective")


@functools.cache
def _without_dropout(ranks: int, kind: str) -> LayoutResult:
    batch_of = functools.partial(make_batch, documents=True)
    options = DENSE | {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    return run_layout(
        ranks, batch_of=batch_of, context_parallel_size=ranks, cp_comm_type=[kind], **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_ranks_of_a_sequence_equal_one_process(kind):
    compare(_without_dropout(2, kind), _without_dropout(1, "p2p"), weights=True)
