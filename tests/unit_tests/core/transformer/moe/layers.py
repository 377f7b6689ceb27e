"""Small MoE layers with the weights of the reference, and what tests do with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import logical_shards, role_of
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.whole_tensors import whole_tensors
from tests.reference.activations import ReferenceActivation
from tests.reference.moe import ReferenceMoE, ReferenceRule

H, FFN, NUM_EXPERTS = 16, 24, 8
EMPTY_EXPERT, HOT_EXPERT = 5, 2
COLLECTIVES = {
    "all_to_all_single": dist,
    "all_reduce": dist,
    "reduce_scatter_tensor": dist,
    "all_gather_single": mappings,
}


def moe_config(**options: Any) -> TransformerConfig:
    """Return a config of small sizes without balance losses; ``options`` win."""
    values = {
        "num_layers": 2,
        "hidden_size": H,
        "num_attention_heads": 2,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": NUM_EXPERTS,
        "moe_aux_loss_coeff": [0.0],
        "swiglu": True,
        "add_bias_linear": False,
    }
    return TransformerConfig(**(values | options))


def make_groups(
    ep: int = 1, node_size: int | None = None, *, etp: int = 1
) -> ProcessGroupCollection:
    """Create the groups of this world with ``ep`` expert-parallel ranks, in nodes if said."""
    layout = ParallelLayout(world_size=dist.get_world_size(), ep=ep, etp=etp, node_size=node_size)
    return ProcessGroupCollection.create(layout)


def make_rule(config: TransformerConfig) -> ReferenceRule:
    """Return the routing options as the reference takes them."""
    return ReferenceRule(
        topk=config.moe_router_topk,
        score_function=config.moe_router_score_function,
        pre_softmax=config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
        num_groups=config.moe_router_num_groups or 1,
        group_topk=config.moe_router_group_topk or 1,
        group_score_topk=config.moe_router_group_score_topk,
        norm_topk_prob=config.moe_router_norm_topk_prob,
    )


def make_reference(config: TransformerConfig) -> ReferenceMoE:
    """Build the textbook layer with weights that are the same on every rank.

    Feature 0 of a token is 1 (see ``make_tokens``), so column 0 of the gate is a bias: one expert
    gets no token, another gets most.
    """
    assert config.num_moe_experts is not None
    reference = ReferenceMoE(
        config.hidden_size,
        config.moe_ffn_size,
        config.num_moe_experts,
        activation=ReferenceActivation(*config.activation_kind),
        bias=config.has_mlp_bias,
        latent_bias=config.add_bias_linear,
        router_bias=config.moe_router_bias,
        rule=make_rule(config),
        capacity_factor=config.moe_expert_capacity_factor,
        drop_policy=config.moe_token_drop_policy,
        shared_ffn=config.moe_shared_expert_intermediate_size,
        shared_gate=config.moe_shared_expert_gate,
        latent=config.moe_latent_size,
    ).to(getattr(torch, config.params_dtype_name))
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
        reference.gate.weight[:, 0] = 0.0
        reference.gate.weight[HOT_EXPERT, 0] = 2.0
        reference.gate.weight[EMPTY_EXPERT, 0] = -50.0
    return reference


def make_layer(
    config: TransformerConfig, groups: ProcessGroupCollection, reference: ReferenceMoE
) -> MoELayer:
    """Build this rank's part of the MoE layer, with the weights of ``reference``."""
    layer = build_module(get_moe_module_spec(config), config, layer_number=1, pg_collection=groups)
    weights = reference.logical()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            for shard in logical_shards(name, p, role_of(p)):
                shard.tensor.copy_(weights[shard.name][shard.region])
    return layer


def make_tokens(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a leaf [num_tokens, H] whose feature 0 is 1."""
    rng = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randn(num_tokens, H, generator=rng).to(dtype)
    tokens[:, 0] = 1.0
    return tokens.requires_grad_()


def logical_gradients(module: nn.Module, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """Sum each gradient over the ranks that hold the parameter; a missing one is an error.

    Slices are made whole.
    """
    found = {}
    for name, p in module.named_parameters():
        role = role_of(p)
        assert p.grad is not None, f"no gradient of {name}"
        total = p.grad.clone()
        dist.all_reduce(total, group=groups.expt_dp if role.is_expert else groups.dp_cp)
        found.update(whole_tensors(name, total, role, groups))
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest wanted value (at least 1)."""
    assert got.shape == want.shape, f"{got.shape=} {want.shape=}"
    if want.numel() == 0:
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp(min=1.0)).item()


@contextmanager
def count_collectives() -> Iterator[list[tuple[str, int]]]:
    """List (name, dimensions of the tensor) of every collective in the block."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(home, name) for name, home in COLLECTIVES.items()}

    def counted(name: str) -> Any:
        def call(out: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, out.dim()))
            return originals[name](out, *args, **kwargs)

        return call

    try:
        for name, home in COLLECTIVES.items():
            setattr(home, name, counted(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(COLLECTIVES[name], name, original)
