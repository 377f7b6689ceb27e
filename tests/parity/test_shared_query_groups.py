"""R1, R2: fewer query groups than tensor-parallel ranks train, save and load as on one process."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors, write_tensors
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import query_groups
from megatron.core.tensor_parallel.weight_init import init_weights
from tests.helpers.layouts import LayoutResult, run_layout
from tests.helpers.models import MAX_LENGTH, tiny_config
from tests.helpers.ranks import run_ranks
from tests.parity.test_context_parallel import DENSE as DENSE_OF_CP
from tests.parity.test_context_parallel import make_batch
from tests.parity.test_layouts import assert_equal, compare

HEADS = 8
DENSE = DENSE_OF_CP | {"num_attention_heads": HEADS, "group_query_attention": True}
ROPE = {"position_embedding_type": "rope", "add_bias_linear": False, "add_qkv_bias": True}
SLOW = pytest.mark.slow


@functools.cache
def one_process(groups: int, rope: bool) -> LayoutResult:
    """The run that all layouts are compared with."""
    options = DENSE | (ROPE if rope else {}) | {"num_query_groups": groups}
    return run_layout(1, batch_of=make_batch, **options)


def check(world_size: int, groups: int, *, rope: bool = True, **layout: Any) -> None:
    """Compare everything that a short run leaves behind."""
    options = DENSE | (ROPE if rope else {}) | {"num_query_groups": groups}
    got = run_layout(world_size, batch_of=make_batch, **options, **layout)
    compare(got, one_process(groups, rope), weights=True)


@pytest.mark.parametrize(
    ("world_size", "tp", "groups", "shared", "rope"),
    [
        (2, 2, 1, True, True),
        (4, 4, 2, False, True),
        (4, 4, 1, True, False),
        pytest.param(2, 2, 1, False, False, marks=SLOW),
        pytest.param(4, 2, 1, False, True, marks=SLOW),
        pytest.param(4, 4, 1, False, True, marks=SLOW),
        pytest.param(4, 4, 2, True, True, marks=SLOW),
        pytest.param(4, 4, 2, True, False, marks=SLOW),
    ],
)
def test_ranks_that_share_a_group_equal_one_process(world_size, tp, groups, shared, rope):
    layout = {"tensor_model_parallel_size": tp, "sequence_parallel": shared}
    check(world_size, groups, rope=rope, **layout)


@SLOW
@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
def test_ranks_that_share_a_group_and_a_sequence_equal_one_process(kind):
    layout = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "cp_comm_type": [kind]}
    check(4, 1, sequence_parallel=True, **layout)


@SLOW
def test_shards_of_the_optimizer_know_nothing_of_it():
    options = DENSE | ROPE | {"num_query_groups": 1, "tensor_model_parallel_size": 2}
    got = run_layout(4, batch_of=make_batch, use_distributed_optimizer=True, **options)
    for mine, theirs in zip(got.steps, one_process(1, True).steps, strict=True):
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-12)
        assert_equal(mine.weights, theirs.weights, "weight")


def test_a_mate_left_out_of_the_sum_is_seen(monkeypatch):
    one_process(1, True)
    right = query_groups._Copies.backward

    def forgets(ctx, grad):
        for start, end in ctx.blocks[:-1]:
            grad = grad.clone()
            grad[: end - start] = 0.0
        return right(ctx, grad)

    monkeypatch.setattr(query_groups._Copies, "backward", forgets)
    with pytest.raises(AssertionError, match=r"step 0: (lm_loss|grad_norm)"):
        check(2, 1, tensor_model_parallel_size=2)


def _model(groups: int) -> GPTModel:
    options = {"num_attention_heads": HEADS, "group_query_attention": True}
    options["softmax_type"] = "learnable"  # its sinks are slices too
    options |= {"num_query_groups": groups, "tensor_model_parallel_size": dist.get_world_size()}
    config = tiny_config(swiglu=True, ffn_hidden_size=24, add_qkv_bias=True, **options)
    collection = ProcessGroupCollection.create(config.layout(dist.get_world_size()))
    spec = get_gpt_decoder_block_spec(config)
    return GPTModel(config, spec, 48, MAX_LENGTH, pg_collection=collection)


def _move(groups: int, source: str | None, target: str) -> None:
    """Load ``source`` (or draw, and change what was drawn), save to ``target``, keep logits."""
    model = _model(groups)
    init_weights(model, 7)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.mul_(3.0).add_(0.01 * number)
            if source is not None:
                param.zero_()
    if source is not None:
        read_tensors(Path(source), model_tensors(model), dist.group.WORLD, prefixes=("model.",))
    Path(target).mkdir(exist_ok=True)
    write_tensors(Path(target), model_tensors(model), dist.group.WORLD)
    ids = torch.arange(20).view(2, 10)
    logits = model(ids, torch.arange(10).expand(2, 10)).detach()
    if dist.get_rank() == 0:
        torch.save(logits, Path(target) / "logits.pt")


@pytest.mark.parametrize("groups", [1, 2])
def test_checkpoints_go_from_four_ranks_to_one_and_to_two(tmp_path, groups):
    previous, logits = None, []
    for ranks in (4, 1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run_ranks(_move, ranks, groups, previous, str(folder))
        logits.append(torch.load(folder / "logits.pt"))
        previous = str(folder)
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() <= 1e-12 * logits[0].abs().max()
