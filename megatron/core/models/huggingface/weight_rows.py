"""Rows of tables of weights that several families share; the Llama names and what they mean."""

from collections.abc import Callable
from typing import Literal

from megatron.core.models.huggingface.model_facts import ModelFacts
from megatron.core.models.huggingface.tables import Weight
from megatron.core.models.huggingface.transforms import (
    SHAPES,
    plain,
    qkv,
    vocabulary,
)

When = Callable[[ModelFacts], bool]
Layers = Literal["all", "dense", "moe"]

HF_LAYER = "model.layers.{layer}."
LAYER = "decoder.layers.{layer}."
ATTENTION = LAYER + "self_attention."
EXPERT = LAYER + "mlp.experts.local_experts.{expert}."


def option(name: str) -> When:
    """Return the condition that an option is on."""
    return lambda facts: bool(facts[name])


def untied(facts: ModelFacts) -> bool:
    """Tell whether the output layer has a weight of its own."""
    return bool(facts["untie_embeddings_and_output_weights"])


def qkv_bias(facts: ModelFacts) -> bool:
    """Tell whether the projections to queries, keys and values have biases."""
    return facts.config.add_bias_linear or facts.config.add_qkv_bias


def proj_bias(facts: ModelFacts) -> bool:
    """Tell whether the projection back has a bias."""
    return facts.config.add_bias_linear or facts.config.add_proj_bias


def mlp_bias(facts: ModelFacts) -> bool:
    """Tell whether MLPs have biases."""
    return facts.config.has_mlp_bias


def as_is(
    hf: str,
    key: str,
    shape: str,
    *,
    when: When = lambda facts: True,
    layers: Layers = "all",
    is_fp32: bool = False,
) -> Weight:
    """Return the row of a tensor that is the same here; ``shape`` names one of ``SHAPES``."""
    return Weight(hf, key, plain(SHAPES[shape]), when, layers, is_fp32)


OUTER = (
    Weight("model.embed_tokens.weight", "embedding.word_embeddings.weight", vocabulary),
    as_is("model.norm.weight", "decoder.final_layernorm.weight", "hidden"),
    Weight("lm_head.weight", "output_layer.weight", vocabulary, untied),
)
"""Embedding, last norm, output layer."""

NORMS = (
    as_is(HF_LAYER + "input_layernorm.weight", LAYER + "input_layernorm.weight", "hidden"),
    as_is(
        HF_LAYER + "post_attention_layernorm.weight", LAYER + "pre_mlp_layernorm.weight", "hidden"
    ),
)

SELF_ATTENTION = (
    *(
        Weight(HF_LAYER + f"self_attn.{part}_proj.weight", ATTENTION + "linear_qkv.weight",
               qkv(part))
        for part in "qkv"
    ),
    *(
        Weight(HF_LAYER + f"self_attn.{part}_proj.bias", ATTENTION + "linear_qkv.bias",
               qkv(part, is_bias=True), qkv_bias)
        for part in "qkv"
    ),
    as_is(HF_LAYER + "self_attn.o_proj.weight", ATTENTION + "linear_proj.weight", "proj"),
    as_is(HF_LAYER + "self_attn.o_proj.bias", ATTENTION + "linear_proj.bias", "hidden",
          when=proj_bias),
)  # fmt: skip
"""Four projections with their biases."""

QK_NORMS = tuple(
    as_is(HF_LAYER + f"self_attn.{part}_norm.weight", ATTENTION + f"{part}_layernorm.weight",
          "head", when=option("qk_layernorm"))
    for part in "qk"
)  # fmt: skip
"""Norms of queries and keys, head by head."""

DENSE_MLP = (
    as_is(HF_LAYER + "mlp.gate_proj.weight", LAYER + "mlp.linear_fc1.gate.weight", "fc1",
          layers="dense"),
    as_is(HF_LAYER + "mlp.up_proj.weight", LAYER + "mlp.linear_fc1.up.weight", "fc1",
          layers="dense"),
    as_is(HF_LAYER + "mlp.down_proj.weight", LAYER + "mlp.linear_fc2.weight", "fc2",
          layers="dense"),
    as_is(HF_LAYER + "mlp.gate_proj.bias", LAYER + "mlp.linear_fc1.gate.bias", "fc1_bias",
          layers="dense", when=mlp_bias),
    as_is(HF_LAYER + "mlp.up_proj.bias", LAYER + "mlp.linear_fc1.up.bias", "fc1_bias",
          layers="dense", when=mlp_bias),
    as_is(HF_LAYER + "mlp.down_proj.bias", LAYER + "mlp.linear_fc2.bias", "hidden",
          layers="dense", when=mlp_bias),
)  # fmt: skip
"""Gated MLP of a dense layer."""


def experts(router: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Return the rows of a router and its experts, one by one.

    Args:
        router: Name of the router's weight, behind the layer.
        gate: Of an expert's gate projection, with ``{expert}``.
        up: Of its up projection.
        down: Of its down projection.
    """
    return (
        as_is(HF_LAYER + router, LAYER + "mlp.router.weight", "router", layers="moe"),
        as_is(HF_LAYER + gate, EXPERT + "linear_fc1.gate.weight", "expert_fc1", layers="moe"),
        as_is(HF_LAYER + up, EXPERT + "linear_fc1.up.weight", "expert_fc1", layers="moe"),
        as_is(HF_LAYER + down, EXPERT + "linear_fc2.weight", "expert_fc2", layers="moe"),
    )


QWEN_EXPERTS = experts(
    "mlp.gate.weight",
    "mlp.experts.{expert}.gate_proj.weight",
    "mlp.experts.{expert}.up_proj.weight",
    "mlp.experts.{expert}.down_proj.weight",
)
"""Router and experts as Qwen names them."""


def shared_experts(name: str) -> tuple[Weight, ...]:
    """Return the rows of the shared experts, which are one wide MLP, under ``mlp.<name>``."""
    has = option("moe_shared_expert_intermediate_size")
    ours = LAYER + "mlp.shared_experts."
    return tuple(
        as_is(HF_LAYER + f"mlp.{name}.{part}_proj.weight", ours + key, shape, when=has,
              layers="moe")
        for part, key, shape in (
            ("gate", "linear_fc1.gate.weight", "shared_fc1"),
            ("up", "linear_fc1.up.weight", "shared_fc1"),
            ("down", "linear_fc2.weight", "shared_fc2"),
        )
    )  # fmt: skip
