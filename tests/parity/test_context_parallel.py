"""R1, R2: sequences shared over ranks train as on one process; checkpoints fit any share."""

import functools

import pytest
import torch

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
KINDS = ["p2p", "all_gather", "a2a"]
QUICK = [(2, 1, False), (4, 2, True)]  # (ranks, tensor parallel, sequence parallel); CP 2
SLOW = [(4, 1, False), (4, 2, False)]


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
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_of_a_sequence_equal_one_process(case, kind):
    check(case, kind, ranks=4, cp=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "shared"), [(1, False), (2, False), (2, True)])
def test_with_data_or_tensor_parallelism_they_equal_one_process(tp, shared, kind):
    check("groups_rope", kind, ranks=4, tp=tp, shared=shared)
