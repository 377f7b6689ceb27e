"""A mixture-of-experts GPT on two ranks has the weights and the losses of one process."""

import torch
import torch.distributed as dist

from megatron.core.parallel_layout import ParallelLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights, tensor_hashes
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import TOLERANCES

OPTIONS = {"num_moe_experts": 4, "swiglu": True, "moe_layer_freq": [0, 1]}


def _expert_parallel_body(hashes: dict[str, str], losses: torch.Tensor) -> None:
    groups = ProcessGroupCollection.create(ParallelLayout(world_size=2, ep=2))
    model = tiny_gpt(tiny_config(**OPTIONS, expert_model_parallel_size=2), pg_collection=groups)
    gathered: list = [None, None]
    dist.all_gather_object(gathered, tensor_hashes(model))
    mine, other = gathered[dist.get_rank()], gathered[1 - dist.get_rank()]
    assert mine | other == hashes
    assert all("local_experts" not in key for key in mine.keys() & other.keys())
    ids, positions, labels = tiny_batch(samples=4)
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    got = model(ids[own], positions[own], labels=labels[own])
    torch.testing.assert_close(got, losses[own], **TOLERANCES[torch.float64])


def test_experts_on_two_ranks_are_those_of_one_process() -> None:
    model = tiny_gpt(tiny_config(**OPTIONS))
    ids, positions, labels = tiny_batch(samples=4)
    losses = model(ids, positions, labels=labels).detach()
    run_ranks(_expert_parallel_body, 2, tensor_hashes(model), losses)


def test_no_two_experts_of_a_model_are_equal() -> None:
    hashes = tensor_hashes(tiny_gpt(tiny_config(**OPTIONS)))
    experts = [
        value for key, value in hashes.items() if "local_experts" in key and "bias" not in key
    ]
    assert len(experts) == 4 * 2
    assert len(set(experts)) == len(experts)


def test_both_expert_banks_begin_with_the_same_weights_and_losses() -> None:
    ids, positions, labels = tiny_batch()
    models = [
        tiny_gpt(tiny_config(**OPTIONS, moe_experts_type=kind))
        for kind in ("grouped", "sequential")
    ]
    for model in models:
        init_weights(model, seed=2)
    assert tensor_hashes(models[0]) == tensor_hashes(models[1])
    losses = [model(ids, positions, labels=labels) for model in models]
    torch.testing.assert_close(*losses, **TOLERANCES[torch.float64])


def test_pattern_places_dense_and_moe_layers() -> None:
    layers = tiny_gpt(tiny_config(**OPTIONS)).decoder.layers
    assert [hasattr(layer.mlp, "router") for layer in layers.values()] == [False, True]
