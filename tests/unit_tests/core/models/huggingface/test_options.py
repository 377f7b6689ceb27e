"""config.json to options and back: every field read, ignored by name, or refused by name."""

from typing import Any

import pytest

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.config_rows import IGNORED
from megatron.core.models.huggingface.family import FAMILIES, families, family_named, family_of
from megatron.core.models.huggingface.options import hf_config_of, model_options
from tests.helpers.hf_cases import CASES
from tests.helpers.hf_tiny import BUILT, options_of


@pytest.mark.parametrize("name", BUILT)
def test_what_is_written_means_what_was_read(name: str) -> None:
    options = options_of(name)
    written = hf_config_of(options, family_of(CASES[name].config), dtype="bfloat16")
    assert model_options(written) == options
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_transformers_is_read_or_known_to_change_nothing(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    family = family_named(name)
    if name == "grok":
        pytest.skip("transformers has no Grok-1")
    made = transformers.AutoConfig.for_model(family.model_types[0]).to_dict()
    known = {field for row in family.rows for field in row.defaults}
    known |= IGNORED | family.ignored_fields | family.aliases.keys()
    assert {field for field in made if not field.startswith("_")} - known == set()


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return CASES[name].config | fields


REFUSED = {
    "unknown": (changed("llama2", rescale_everything=2), "unknown rescale_everything"),
    "no kind": ({"hidden_size": 4}, "names no model_type; known here: deepseek_v2"),
    "another kind": ({"model_type": "t5"}, "model_type t5 is not known here; known: deepseek_v2"),
    "activation": (changed("llama2", hidden_act="relu"), "hidden_act 'relu' is not offered"),
    "clamped": (changed("olmoe", clip_qkv=8.0), "clip_qkv 8.0 is not offered"),
    "scaled by layer": (
        changed("gpt2", scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx True is not offered",
    ),
    "other dropouts": (changed("gpt2", embd_pdrop=0.3), "embd_pdrop 0.3 differs from resid_pdrop"),
    "dynamic": (
        changed("llama2", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' is not offered",
    ),
    "rope by layer": (
        changed("llama2", rope_parameters={"full_attention": {"rope_type": "default"}}),
        "for full_attention are not offered",
    ),
    "strange rope": (
        changed("llama2", rope_scaling={"type": "linear", "factor": 2.0, "twist": 1}),
        "rope type linear has no twist here",
    ),
    "kinds of layers": (
        changed("qwen2", layer_types=["full_attention", "mamba"] * 2),
        "layer_types mamba are not offered",
    ),
    "jitter": (changed("mixtral", router_jitter_noise=0.1), "--moe-input-jitter-eps"),
    "no positions": (
        {"model_type": "smollm3", "num_hidden_layers": 8},
        "no_rope_layers leaves layers 3, 7 without positions",
    ),
    "grok's activation": (changed("grok-1", hidden_act="relu"), "hidden_act 'relu'"),
    "renormalised V2": (
        changed("deepseek-v2", norm_topk_prob=True),
        "norm_topk_prob True is not offered",
    ),
    "epsilon of latents": (changed("deepseek-v2", rms_norm_eps=1e-5), "rms_norm_eps 1e-05"),
    "choice of V2": (changed("deepseek-v2", topk_method="best"), "topk_method 'best'"),
    "fewer keys of latents": (
        changed("deepseek-v3", num_key_value_heads=2),
        "num_key_value_heads 2 must be num_attention_heads 4",
    ),
    "freq of DeepSeek": (changed("deepseek-v3", moe_layer_freq=2), "moe_layer_freq 2"),
    "no shared expert": (changed("deepseek-v3", n_shared_experts=None), "n_shared_experts None"),
    "alpha": (changed("gpt-oss", swiglu_alpha=2.0), "swiglu_alpha 2.0 is not offered"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_built_is_refused_by_name(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ConfigError) as raised:
        model_options(config)
    assert words in str(raised.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        model_options(changed("olmoe", clip_qkv=1.0, hidden_act="relu", new_field=1))
    assert len(raised.value.problems) == 3


def test_the_user_may_vouch_for_a_field() -> None:
    config = changed("llama2", rescale_everything=2)
    assert model_options(config, ignore=["rescale_everything"]) == options_of("llama2")


def test_both_ways_of_writing_rotary_positions_are_read() -> None:
    new = changed("llama3")
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    parameters = dict(new["rope_parameters"])
    old["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    old["rope_scaling"] = parameters
    assert model_options(old) == model_options(new)
    written = hf_config_of(model_options(new), "llama")
    only_old = {name: value for name, value in written.items() if name != "rope_parameters"}
    only_new = {
        name: v for name, v in written.items() if name not in ("rope_scaling", "rope_theta")
    }
    assert model_options(only_old) == model_options(only_new) == model_options(new)


def test_windows_by_layer_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = changed("qwen2-windows")
    theirs = transformers.Qwen2Config(**{k: v for k, v in config.items() if k != "model_type"})
    slides = [int(kind == "sliding_attention") for kind in theirs.layer_types]
    assert model_options(config)["window_attn_skip_freq"] == slides == [0, 0, 1, 1]
    moe = changed("qwen2-moe", use_sliding_window=True, max_window_layers=3)
    other = transformers.Qwen2MoeConfig(**{k: v for k, v in moe.items() if k != "model_type"})
    slides = [int(kind == "sliding_attention") for kind in other.layer_types]
    assert model_options(moe)["window_attn_skip_freq"] == slides == [1, 0, 1, 0]


def test_other_names_of_a_field_are_read() -> None:
    config = changed("qwen3-moe")
    config["num_local_experts"] = config.pop("num_experts")
    assert model_options(config) == options_of("qwen3-moe")


def test_a_family_says_what_it_cannot_say() -> None:
    options = options_of("llama2") | {"add_qkv_bias": True}
    with pytest.raises(ConfigError, match="--add-qkv-bias and --add-proj-bias go together"):
        hf_config_of(options, "llama")
    with pytest.raises(ConfigError, match="there is no family bert; families: gpt2, llama"):
        family_named("bert")


def test_families_have_names_of_their_own() -> None:
    assert [family.name for family in families()] == list(FAMILIES)
    kinds = [kind for family in families() for kind in family.model_types]
    assert len(kinds) == len(set(kinds))
