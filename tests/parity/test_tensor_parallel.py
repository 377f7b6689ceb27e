"""R1, R2: dense tensor parallelism equals one process, and checkpoints fit any size of it."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors, write_tensors
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import region_entry, regions
from megatron.core.tensor_parallel.cross_entropy import linear_cross_entropy
from megatron.core.tensor_parallel.region_entry import RegionEntry
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.blocked_attention import WeightDropout
from tests.helpers.layouts import LayoutResult, run_layout
from tests.helpers.models import MAX_LENGTH, tiny_config
from tests.helpers.ranks import run_ranks
from tests.parity.test_layouts import compare

DENSE = {
    "num_moe_experts": None,
    "moe_aux_loss_coeff": None,
    "moe_z_loss_coeff": None,
    "num_attention_heads": 4,
    "optimizer": "sgd",
}
CASES = {
    "learned_positions": {},
    "groups_rope_untied": {
        "position_embedding_type": "rope",
        "group_query_attention": True,
        "num_query_groups": 2,
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
    },
    "gelu_without_bias": {"swiglu": False, "add_bias_linear": False, "add_qkv_bias": True},
    "adam_clipped_overlap": {
        "optimizer": "adam",
        "lr": 1e-3,
        "clip_grad": 0.1,
        "overlap_grad_reduce": True,
        "bucket_size": 700,
    },
}
LAYOUTS = [(2, 2), (4, 2)]  # (ranks, TP)


@functools.cache
def one_process(case: str) -> LayoutResult:
    """The run that all layouts of ``case`` are compared with."""
    return run_layout(1, **(DENSE | CASES[case]))


def check(case: str, world_size: int, tp: int, shared: bool = False) -> None:
    """Compare everything that a short run leaves behind."""
    options = DENSE | CASES[case]
    layout = {"tensor_model_parallel_size": tp, "sequence_parallel": shared}
    got = run_layout(world_size, **layout, **options)
    compare(got, one_process(case), weights=options["optimizer"] == "sgd")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("world_size", "tp"), LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_layout_equals_one_process(case, world_size, tp, shared):
    check(case, world_size, tp, shared)


@pytest.mark.parametrize("shared", [False, True])
def test_each_head_of_four_on_a_rank_of_its_own_equals_one_process(shared):
    check("learned_positions", 4, 4, shared)


def _same_masks(patch: pytest.MonkeyPatch) -> None:
    right = WeightDropout.kept

    def as_the_first_rank(self, *args, **places):
        return right(self._replace(first_head=0), *args, **places)

    patch.setattr(WeightDropout, "kept", as_the_first_rank)


def _same_dropout_on_every_share(patch: pytest.MonkeyPatch) -> None:
    right = transformer_layer.sequence_share
    patch.setattr(transformer_layer, "sequence_share", lambda *args: right(*args)._replace(rank=0))


def _norms_that_learn_from_their_share(patch: pytest.MonkeyPatch) -> None:
    def group(self, key):
        groups = self.pg_collection
        return groups.expt_dp if key.is_expert else groups.dp_cp

    patch.setattr(DistributedDataParallel, "_group", group)


def _partial_gradient_of_inputs(patch: pytest.MonkeyPatch) -> None:
    def own_part(self, grad):
        return region_entry.GradientSum(RegionEntry(), grad)

    patch.setattr(RegionEntry, "start_sum", own_part)


def _summed_gradient_of_outputs(patch: pytest.MonkeyPatch) -> None:
    class Doubles(regions._ReduceFrom):
        @staticmethod
        def forward(ctx, group, x):
            ctx.group = group
            return regions.all_reduce_(group, x.clone())

        @staticmethod
        def backward(ctx, grad):
            return None, regions.all_reduce_(ctx.group, grad.clone())

    patch.setattr(regions, "_ReduceFrom", Doubles)


@pytest.mark.parametrize(
    ("plant", "shared"),
    [
        (_same_masks, False),
        (_partial_gradient_of_inputs, False),
        (_summed_gradient_of_outputs, False),
        (_same_dropout_on_every_share, True),
        (_norms_that_learn_from_their_share, True),
    ],
)
def test_a_planted_bug_is_seen(plant, shared, monkeypatch):
    one_process("learned_positions")  # before the bug is there
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"step 0: (lm_loss|grad_norm)|replicas|disagree"):
        check("learned_positions", 2, 2, shared)


def _loss(dtype: torch.dtype) -> None:
    group, vocab = dist.group.WORLD, 48
    rng = torch.Generator().manual_seed(4)
    hidden = torch.randn(600, 8, generator=rng).to(dtype).requires_grad_()
    weight = (3 * torch.randn(vocab, 8, generator=rng)).to(dtype)
    labels = torch.randint(vocab, (600,), generator=rng)
    whole = weight.clone().requires_grad_()
    want = linear_cross_entropy(hidden, whole, labels)
    want.square().sum().backward()
    d_hidden, hidden.grad = hidden.grad, None
    share = vocab // group.size()
    mine = slice(group.rank() * share, (group.rank() + 1) * share)
    part = weight[mine].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, part, labels, RegionEntry(group))
    loss.square().sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    pairs = [(loss, want), (part.grad, whole.grad[mine]), (hidden.grad, d_hidden)]
    for got, wanted in pairs:
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_entropy_over_a_split_vocabulary_is_that_of_the_whole(world_size, dtype):
    run_ranks(_loss, world_size, dtype)


def _model(tp: int) -> GPTModel:
    config = tiny_config(tensor_model_parallel_size=tp, swiglu=True, ffn_hidden_size=24)
    groups = ProcessGroupCollection.create(config.layout(dist.get_world_size()))
    spec = get_gpt_decoder_block_spec(config)
    return GPTModel(config, spec, 48, MAX_LENGTH, pg_collection=groups)


def _save(folder: str) -> None:
    model = _model(dist.get_world_size())
    init_weights(model, 7)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)  # no longer what is drawn
    write_tensors(Path(folder), model_tensors(model), dist.group.WORLD)


def _load(folder: str) -> None:
    expected, model = (_model(dist.get_world_size()) for _ in range(2))
    init_weights(expected, 7)
    read_tensors(Path(folder), model_tensors(model), dist.group.WORLD, prefixes=("model.",))
    theirs = dict(expected.named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(param, 1.5 * theirs[name]), name
    ids = torch.arange(20).view(2, 10)
    logits = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(logits, model(ids, torch.arange(10).expand(2, 10)).detach())
    assert all(torch.equal(one, logits[0]) for one in logits)
    assert logits[0].shape == (2, 10, 48)


@pytest.mark.parametrize("saved", [1, 2, 4])
def test_a_model_loads_what_any_size_of_tensor_parallelism_saved(tmp_path, saved):
    run_ranks(_save, saved, str(tmp_path))
    for loaded in (1, 2, 4):
        run_ranks(_load, loaded, str(tmp_path))
