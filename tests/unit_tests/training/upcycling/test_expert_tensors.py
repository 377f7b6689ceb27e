"""Every tensor of the dense model is accounted for; what is not understood is named."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.errors import CheckpointError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.upcycling.expert_tensors import upcycled_tensors
from megatron.training.upcycling.preservation import Recipe


class Stored:
    """Tensors in memory that look like a checkpoint, and which were read."""

    path = Path("dense")

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            key: torch.randn(shape, generator=generator) for key, shape in shapes.items()
        }
        self.reads: list[str] = []

    @property
    def keys(self) -> list[str]:
        return list(self.tensors)

    def facts(self, key: str) -> TensorFacts:
        return TensorFacts(tuple(self.tensors[key].shape), self.tensors[key].dtype)

    def read(self, key: str) -> Tensor:
        self.reads.append(key)
        return self.tensors[key]


def shapes(**changes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embedding.word_embeddings.weight": (16, 8)}
    for layer in (0, 1):
        found |= {
            f"model.decoder.layers.{layer}.mlp.linear_fc1.weight": (12, 8),
            f"model.decoder.layers.{layer}.mlp.linear_fc2.weight": (8, 12),
            f"model.decoder.layers.{layer}.pre_mlp_layernorm.weight": (8,),
            f"optimizer.exp_avg.decoder.layers.{layer}.mlp.linear_fc2.weight": (8, 12),
        }
    found["rng.0.torch"] = (4,)
    for key, shape in changes.items():
        full = f"model.decoder.layers.1.mlp.{key.replace('__', '.')}"
        found.pop(full, None)
        if shape is not None:
            found[full] = shape
    return found


def config(**options: object) -> TransformerConfig:
    values = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 4}
    values |= {"moe_ffn_hidden_size": 12, "ffn_hidden_size": 12, "add_bias_linear": False}
    return TransformerConfig(**values | options)


def test_moments_and_random_states_are_left_and_everything_else_is_there() -> None:
    made = upcycled_tensors(Stored(shapes()), config(moe_layer_freq=[0, 1]), Recipe())
    assert sorted(key for key in made if "experts" not in key) == [
        "model.decoder.layers.0.mlp.linear_fc1.weight",
        "model.decoder.layers.0.mlp.linear_fc2.weight",
        "model.decoder.layers.0.pre_mlp_layernorm.weight",
        "model.decoder.layers.1.mlp.router.weight",
        "model.decoder.layers.1.pre_mlp_layernorm.weight",
        "model.embedding.word_embeddings.weight",
    ]
    assert len(made) == 6 + 4 * 2
    assert all(tuple(one.make().shape) == one.facts.shape for one in made.values())


def test_a_dense_tensor_is_read_once_for_all_its_experts() -> None:
    source = Stored(shapes())
    made = upcycled_tensors(source, config(), Recipe())
    for key, one in made.items():
        if "layers.1.mlp.experts" in key:
            one.make()
    assert len(source.reads) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"linear_fc3__weight": (8, 8)}, "linear_fc3.weight: upcycling knows no such tensor"),
        ({"linear_fc2__weight": None}, "has no mlp.linear_fc2.weight of layer 1"),
        ({"linear_fc1__weight": (13, 8)}, "it has no 12 ffn channels"),
        (
            {"linear_fc1__weight": None, "linear_fc2__weight": None},
            "has no mlp.linear_fc1.weight of layer 1",
        ),
    ],
)
def test_an_mlp_that_is_not_understood_is_named(changes, told) -> None:
    with pytest.raises(CheckpointError, match=told):
        upcycled_tensors(Stored(shapes(**changes)), config(), Recipe())


def test_routers_begin_with_all_that_they_keep() -> None:
    options = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    made = upcycled_tensors(Stored(shapes()), config(**options), Recipe(granularity=1))
    bias = made["model.decoder.layers.0.mlp.router.expert_bias"].make()
    assert bias.dtype == torch.float32
    assert not bias.any()
    rows = made["model.decoder.layers.0.mlp.router.weight"].make()
    other = made["model.decoder.layers.1.mlp.router.weight"].make()
    assert 0.01 < rows.std() < 0.03
    assert not torch.equal(rows, other)
    made = upcycled_tensors(Stored(shapes()), config(moe_router_bias=True), Recipe())
    assert not made["model.decoder.layers.1.mlp.router.bias"].make().any()
    options = {"moe_router_load_balancing_type": "quantile_balancing"}
    made = upcycled_tensors(Stored(shapes()), config(**options), Recipe())
    assert not made["model.decoder.layers.1.mlp.router.qb_beta"].make().any()
    std = Recipe(router_std=3.0)
    rows = upcycled_tensors(Stored(shapes()), config(), std)
    assert rows["model.decoder.layers.0.mlp.router.weight"].make().std() > 1.5
