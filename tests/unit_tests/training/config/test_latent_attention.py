"""What --multi-latent-attention means where nothing else is said."""

from megatron.training.arguments import parse_args
from megatron.training.config.run_config import RunConfig

MODEL = "--mock-data --num-layers 2 --hidden-size 70 --num-attention-heads 4"


def _parsed(words: str) -> RunConfig:
    return parse_args(f"{MODEL} --multi-latent-attention {words}".split(), world_size=1)


def test_positions_norms_and_pairs_are_those_of_latent_attention() -> None:
    model = _parsed("").model
    assert model.position_embedding_type == "rope"
    assert model.rotary_interleaved
    assert model.qk_layernorm
    assert model.rope_scaling == "none"
    assert (model.head_dim, model.value_head_dim, model.rotary_channels) == (192, 128, 64)


def test_a_scaling_factor_alone_means_yarn() -> None:
    model = _parsed("--rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0").model
    assert (model.rope_scaling, model.rope_factor, model.rope_original_length) == (
        *("yarn", 40.0),
        4096,
    )


def test_what_is_given_stays() -> None:
    words = "--position-embedding-type yarn --rotary-scaling-factor 4"
    model = _parsed(words).model
    assert (model.position_embedding_type, model.rope_type) == ("yarn", None)
    words = "--rope-scaling-type linear --rotary-scaling-factor 4"
    assert _parsed(words).model.rope_scaling == "linear"
