"""Kinds of rows of a table of configuration fields."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.tables import ConfigRow, Fields, Options

_IGNORED = """
    architectures attention_probs_dropout_prob auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    quantization_config unsloth_version use_bfloat16 use_cache
"""
IGNORED = frozenset(_IGNORED.split())
"""Fields of any config.json that do not change what the model computes from given ids."""


def same(name: str, option: str, default: Any = None) -> ConfigRow:
    """Return the row of a field that is an option of ours, as it is."""
    return ConfigRow(
        defaults={name: default},
        read=lambda fields: {option: fields[name]},
        write=lambda options: {name: options[option]},
    )


def fixed(name: str, value: Any, *others: Any, default: Any = None, why: str = "") -> ConfigRow:
    """Return the row of a field that must have one value here.

    Args:
        name: The field.
        value: What is built, and written.
        others: Other values that mean the same.
        default: Where config.json does not say it; ``value`` when None.
        why: What another value would mean.
    """

    def read(fields: Fields) -> dict[str, Any]:
        if fields[name] not in (value, *others):
            reason = f": {why}" if why else ""
            raise ConfigError(
                f"config.json: {name} {fields[name]!r} is not offered, only {value!r}{reason}"
            )
        return {}

    return ConfigRow(
        defaults={name: value if default is None else default},
        read=read,
        write=lambda options: {name: value},
    )


def row(
    defaults: Mapping[str, Any],
    read: Callable[[Fields], dict[str, Any]],
    write: Callable[[Options], dict[str, Any]],
) -> ConfigRow:
    """Return the row of fields that only together mean something."""
    return ConfigRow(defaults, read, write)


def vocabulary(default: int) -> ConfigRow:
    """Return the row of the number of rows of the embedding."""
    return row(
        {"vocab_size": default},
        lambda fields: {"padded_vocab_size": fields["vocab_size"]},
        lambda options: {"vocab_size": options["padded_vocab_size"]},
    )


def tied(default: bool) -> ConfigRow:
    """Return the row that says whether the output layer has a weight of its own."""
    return row(
        {"tie_word_embeddings": default},
        lambda fields: {
            "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
        },
        lambda options: {"tie_word_embeddings": not options["untie_embeddings_and_output_weights"]},
    )


def heads(hidden: int, count: int, groups: int | None, *, head_dim: Any = None) -> ConfigRow:
    """Return the row of heads, groups and head size, which derive from each other."""

    def read(fields: Fields) -> dict[str, Any]:
        total, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        size = fields["head_dim"] or fields["hidden_size"] // total
        return {
            "hidden_size": fields["hidden_size"],
            "num_attention_heads": total,
            "kv_channels": size,
            **_groups(total, kv_heads),
        }

    def write(options: Options) -> dict[str, Any]:
        total, width = options["num_attention_heads"], options["hidden_size"]
        grouped = options["group_query_attention"]
        return {
            "hidden_size": width,
            "num_attention_heads": total,
            "num_key_value_heads": options["num_query_groups"] if grouped else total,
            "head_dim": options["kv_channels"] or width // total,
        }

    defaults = {
        "hidden_size": hidden,
        "num_attention_heads": count,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }
    return row(defaults, read, write)


def _groups(total: int, kv_heads: int | None) -> dict[str, Any]:
    if kv_heads is None or kv_heads == total:
        return {"group_query_attention": False, "num_query_groups": 1}
    return {"group_query_attention": True, "num_query_groups": kv_heads}


def dropouts(attention: str, hidden: str | None, *others: str, default: float) -> ConfigRow:
    """Return the row of dropout probabilities.

    Args:
        attention: Field of that of attention weights.
        hidden: Field of that of branch outputs; None when the family has none.
        others: Fields that must be as ``hidden``.
        default: Of all.
    """

    def read(fields: Fields) -> dict[str, Any]:
        found = {"attention_dropout": float(fields[attention] or 0.0)}
        found["hidden_dropout"] = float(fields[hidden]) if hidden else 0.0
        for name in others:
            if fields[name] != fields[hidden or attention]:
                raise ConfigError(
                    f"config.json: {name} {fields[name]} differs from {hidden} "
                    f"{fields[hidden or attention]}; one --hidden-dropout serves both here"
                )
        return found

    def write(options: Options) -> dict[str, Any]:
        named = dict.fromkeys((*((hidden,) if hidden else ()), *others), options["hidden_dropout"])
        return {attention: options["attention_dropout"], **named}

    names = (attention, *((hidden,) if hidden else ()), *others)
    return row(dict.fromkeys(names, default), read, write)


def aux_loss(default: float) -> ConfigRow:
    """Return the row of the coefficient of the balance loss, which training here may change."""

    def write(options: Options) -> dict[str, Any]:
        coeffs = options["moe_aux_loss_coeff"]
        return {"router_aux_loss_coef": coeffs[0] if coeffs else default}

    return row(
        {"router_aux_loss_coef": default},
        lambda fields: {"moe_aux_loss_coeff": [fields["router_aux_loss_coef"]]},
        write,
    )


def attention_bias(default: bool = False) -> ConfigRow:
    """Return the row of the biases of all four projections of attention."""

    def write(options: Options) -> dict[str, Any]:
        if options["add_qkv_bias"] != options["add_proj_bias"]:
            raise ConfigError(
                "--add-qkv-bias and --add-proj-bias go together in this family (attention_bias)"
            )
        return {"attention_bias": options["add_qkv_bias"]}

    return row(
        {"attention_bias": default},
        lambda fields: dict.fromkeys(
            ("add_qkv_bias", "add_proj_bias"), bool(fields["attention_bias"])
        ),
        write,
    )
