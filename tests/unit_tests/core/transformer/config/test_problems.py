"""A config built in Python: Megatron's own forms are taken, contradictions are refused at once."""

import dataclasses
from typing import Any

import pytest

from megatron.core.errors import ConfigError
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.helpers.models import tiny_config, tiny_gpt, world_of_one


def _moe(**options: object) -> TransformerConfig:
    return tiny_config(**({"num_moe_experts": 4} | options))


def test_single_values_are_lists_of_one() -> None:
    ours: Any = _moe(moe_aux_loss_coeff=[0.03], moe_router_load_balancing_type=["aux_loss"])
    theirs: Any = _moe(moe_aux_loss_coeff=0.03, moe_router_load_balancing_type="aux_loss")
    assert theirs == ours
    assert theirs.aux_loss_coeffs == {"aux_loss": 0.03}
    assert dataclasses.replace(theirs, moe_aux_loss_coeff=0).aux_loss_coeffs == {}
    assert _moe(moe_router_load_balancing_type="none").aux_loss_coeffs == {}
    tiny_gpt(theirs)


BAD = {
    "top-1 without a gradient": (
        {"moe_router_topk": 1},
        "--moe-router-topk 1 needs --moe-router-pre-softmax",
    ),
    "top-5 of 4": ({"moe_router_topk": 5}, "--moe-router-topk 5 must lie between 1 and"),
    "heads": (
        {"num_attention_heads": 5},
        "--hidden-size 32 must be a multiple of --num-attention-heads 5, or give --kv-channels",
    ),
    "no heads": ({"num_attention_heads": None}, "--num-attention-heads is missing"),
    "groups": (
        {"group_query_attention": True, "num_query_groups": 3},
        "--num-query-groups 3 must divide --num-attention-heads 4",
    ),
    "router dtype": (
        {"moe_router_dtype": "bf16"},
        "--moe-router-dtype bf16 must be one of fp32, fp64",
    ),
    "balancing": (
        {"moe_router_load_balancing_type": "sinkhorm"},
        "--moe-router-load-balancing-type sinkhorm must be one of aux_loss, seq_aux_loss, "
        "global_aux_loss, sinkhorn, quantile_balancing, none",
    ),
    "dispatcher": (
        {"moe_token_dispatcher_type": "flex"},
        "--moe-token-dispatcher-type flex must be one of allgather, alltoall",
    ),
    "norm": ({"normalization": "rmsnorm"}, "--normalization rmsnorm must be one of LayerNorm"),
    "coefficients": (
        {"moe_aux_loss_coeff": [0.1, 0.2]},
        "--moe-aux-loss-coeff 0.1 0.2 has 2 values for the 1 of --moe-router-load-balancing-type",
    ),
    "balancing twice": (
        {"moe_router_load_balancing_type": ["aux_loss", "aux_loss"]},
        "--moe-router-load-balancing-type aux_loss aux_loss names one way twice",
    ),
    "balancing and none": (
        {"moe_router_load_balancing_type": ["aux_loss", "none"]},
        "--moe-router-load-balancing-type aux_loss none: none excludes the others",
    ),
    "bias of softmax": (
        {"moe_router_enable_expert_bias": True},
        "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid or sqrtsoftplus",
    ),
    "sinkhorn with a capacity": (
        {"moe_router_load_balancing_type": "sinkhorn", "moe_expert_capacity_factor": 1.0},
        "--moe-router-load-balancing-type sinkhorn cannot be combined with --moe-expert-capacity-",
    ),
    "coefficient of quantiles": (
        {"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.1},
        "--moe-router-load-balancing-type quantile_balancing has no loss: leave out",
    ),
    "even and skewed": (
        {"moe_router_force_biased": 1.0, "moe_router_force_load_balancing": True},
        "--moe-router-force-biased and --moe-router-force-load-balancing exclude each other",
    ),
    "tensor parallel": (
        {"tensor_model_parallel_size": 2, "moe_enable_routing_replay": True},
        "--moe-enable-routing-replay with --tensor-model-parallel-size 2 is not offered",
    ),
    "slices": (
        {"expert_tensor_parallel_size": 5, "moe_ffn_hidden_size": 24},
        "--expert-tensor-parallel-size 5 must divide the ffn size of an expert, 24 "
        "(--moe-ffn-hidden-size, else --ffn-hidden-size); sizes that fit: 4, 6, 8",
    ),
    "precisions": ({"bf16": True}, "--bf16 and --fp64 exclude each other"),
    "frequency": ({"moe_layer_freq": 0}, "--moe-layer-freq 0 must be at least 1"),
    "pattern": ({"moe_layer_freq": [1]}, "--moe-layer-freq has 1 entries, one for each of"),
}


@pytest.mark.parametrize("name", BAD)
def test_no_model_is_built_of_a_config_that_would_be_wrong_in_silence(name: str) -> None:
    options, message = BAD[name]
    good, bad = _moe(), _moe(**options)
    moe_slots = get_moe_module_spec(good).submodules
    assert isinstance(moe_slots, MoESubmodules)
    builders = [
        lambda: get_gpt_decoder_block_spec(bad),
        lambda: GPTModel(
            bad, get_gpt_decoder_block_spec(good), 37, 24, pg_collection=world_of_one()
        ),
        lambda: get_moe_module_spec(bad),
        lambda: MoELayer(bad, moe_slots, layer_number=0, pg_collection=world_of_one()),
    ]
    for build in builders:
        with pytest.raises(ConfigError) as error:
            build()
        assert message in str(error.value)
        assert str(error.value).count("\n  - ") == 1


def test_a_dense_model_is_checked_too() -> None:
    spec = get_gpt_decoder_block_spec(tiny_config())
    with pytest.raises(ConfigError, match="--num-attention-heads 5, or give --kv-channels"):
        GPTModel(tiny_config(num_attention_heads=5), spec, 37, 24, pg_collection=world_of_one())


def test_all_problems_are_listed_at_once() -> None:
    bad = _moe(moe_router_topk=1, num_attention_heads=5, moe_router_dtype="bf16")
    with pytest.raises(ConfigError) as error:
        bad.check()
    assert str(error.value).count("\n  - ") == 3


def test_options_of_experts_mean_nothing_to_a_dense_model() -> None:
    tiny_config(moe_router_topk=1, moe_layer_freq=0).check()
