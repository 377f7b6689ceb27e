"""--use-checkpoint-args: which options a run takes from the checkpoint that it begins with.

What the model and its tokenizer are is taken, so that it need not be said again. Options whose
values only fit together are taken together or not at all: all stay when the user gives one.
"""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.errors import CheckpointError
from megatron.core.transformer.config.pipeline import PIPELINE_OPTIONS
from megatron.core.transformer.config.rotary import READ_BY
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.config.flags import Given
from megatron.training.config.options import Option
from megatron.training.starting_point import StartingPoint, starting_point, stored_facts

FLAG = "--use-checkpoint-args"

_ALONE = """
    num_layers hidden_size ffn_hidden_size add_bias_linear add_mlp_bias hidden_dropout
    untie_embeddings_and_output_weights num_attention_heads kv_channels attention_dropout
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    softmax_scale softmax_type attn_logit_softcapping
    add_qkv_bias max_position_embeddings rotary_base rotary_percent
    rotary_interleaved add_proj_bias qk_layernorm qk_layernorm_scope apply_wd_to_qk_layernorm
    normalization layernorm_epsilon seq_length moe_layer_freq moe_ffn_hidden_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size moe_router_type
    moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor
    moe_router_enable_expert_bias moe_router_bias_update_rate moe_input_jitter_eps
    moe_router_dtype moe_router_bias moe_router_norm_topk_prob moe_z_loss_coeff
    moe_router_quantile_balancing_ema
    layernorm_zero_centered_gamma embedding_multiplier residual_multiplier logits_multiplier
    final_logit_softcapping sandwich_norm
"""

MODEL: tuple[tuple[str, ...], ...] = (
    *((name,) for name in _ALONE.split()),
    (
        "position_embedding_type",
        "rope_type",
        "use_rope_scaling",
        "rotary_seq_len_interpolation_factor",
        "rope_scaling_type",
        *READ_BY,
    ),
    (
        "swiglu",
        "geglu",
        "quick_geglu",
        "openai_gelu",
        "squared_relu",
        "glu_linear_offset",
        "activation_func_clamp_value",
    ),
    ("group_query_attention", "num_query_groups"),
    ("window_size", "window_attn_skip_freq"),
    ("fp16", "bf16", "fp64"),
    ("mtp_num_layers", "mtp_loss_scaling_factor"),
    ("parallel_residual", "parallel_residual_shared_norm"),
    ("num_moe_experts", "moe_num_experts_per_layer"),
    ("moe_router_topk", "moe_router_topk_per_layer"),
    ("moe_router_num_groups", "moe_router_group_topk", "moe_router_group_score_topk"),
    ("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
    (
        "moe_expert_capacity_factor",
        "moe_token_drop_policy",
        "moe_pad_expert_input_to_capacity",
    ),
    ("padded_vocab_size", "make_vocab_size_divisible_by"),
    ("unpadded_vocab_size",),
)
"""What makes the model compute what it computed, in training too."""

LAYOUT: tuple[tuple[str, ...], ...] = (
    ("tensor_model_parallel_size", "sequence_parallel"),
    ("context_parallel_size", "cp_comm_type"),
    ("expert_model_parallel_size",),
    ("expert_tensor_parallel_size",),
    ("pipeline_model_parallel_size", *PIPELINE_OPTIONS),
)
"""How it was spread over ranks; taken with --use-mp-args-from-checkpoint-args."""

_OF_THIS_RUN = """
    init_method_std moe_router_force_load_balancing moe_router_force_biased
    moe_enable_routing_replay moe_token_dispatcher_type moe_dispatcher_node_size moe_experts_type
    moe_grouped_mm_backend moe_fused_activation bias_swiglu_fusion moe_permute_fusion
    moe_expert_chunk_tokens moe_shared_expert_overlap
    overlap_moe_expert_parallel_comm delay_wgrad_compute recompute_granularity recompute_method
    recompute_num_layers recompute_modules cache_mla_latents
"""
OF_THIS_RUN = frozenset(_OF_THIS_RUN.split())
"""Options of the model's section that are never taken: they are about machines and trials."""

_FILES = ("tokenizer_model", "vocab_file", "merge_file")
_TOKENIZER = (
    "tokenizer_type",
    *_FILES,
    "vocab_size",
    "tiktoken_pattern",
    "tiktoken_num_special_tokens",
)


def checkpoint_given(said: dict[str, Any], options: dict[str, Option]) -> Given | None:
    """Return what the checkpoint says where the user asks for it; None where nobody asks.

    Args:
        said: Values of the command line and the YAML file, merged.
        options: All options, by field name.
    """
    wanted = _checkpoint_options(said)
    if not wanted.use_checkpoint_args:
        return None
    if wanted.load is None and wanted.pretrained_checkpoint is None:
        return _nothing(f"{FLAG} needs --load or --pretrained-checkpoint, to take options from")
    try:
        start = starting_point(wanted)
        if start is not None:
            return _taken(start, said, options, wanted)
    except CheckpointError as error:
        return _nothing(str(error))
    place = "--load" if wanted.load is not None else "--pretrained-checkpoint"
    place += f" {wanted.load or wanted.pretrained_checkpoint}"
    if wanted.allow_fresh_start:
        return Given(notices=[f"{FLAG}: {place} holds no checkpoint yet, so nothing is taken"])
    return _nothing(
        f"{FLAG}: {place} has no checkpoint to take options from; give the model's options, and "
        "for the first run of a job that resumes itself --allow-fresh-start"
    )


def _checkpoint_options(said: dict[str, Any]) -> CheckpointConfig:
    names = {entry.name for entry in fields(CheckpointConfig)}
    return CheckpointConfig(**{name: value for name, value in said.items() if name in names})


def _nothing(problem: str) -> Given:
    """Say only this: without the checkpoint, no option can be called missing."""
    return Given(problems=[problem], readable=False)


def _taken(
    start: StartingPoint,
    said: dict[str, Any],
    options: dict[str, Option],
    wanted: CheckpointConfig,
) -> Given:
    facts = stored_facts(start)
    if start.is_huggingface:
        _pad_for_ranks(facts["config"]["tokenizer"], said)
    stored = {
        name: value for section in facts["config"].values() for name, value in section.items()
    }
    groups = MODEL + (LAYOUT if wanted.use_mp_args_from_checkpoint_args else ())
    given = Given()
    found = _of_groups(groups, stored, said)
    tokenizer, problem = _tokenizer(start.path, facts.get("tokenizer"), said, wanted)
    if problem:
        given.problems.append(problem)
        for name in (*_TOKENIZER, "padded_vocab_size"):  # nothing that follows is worth telling
            given.doubtful.update(options[name].flags)
    for name, value in (found | tokenizer).items():
        option = options.get(name)
        if option is None or value is None:
            continue
        try:
            given.values[name] = option.from_data(value)
        except ValueError as error:
            given.problems.append(f"{start.path}: {name} {value} {error}")
            given.doubtful.update(option.flags)
    shown = [
        options[name].show(value)
        for name, value in given.values.items()
        if name not in said and value != options[name].default
    ]
    given.notices.append(f"{FLAG}: taken from {start.path}: {', '.join(shown) or 'nothing'}")
    return given


def _pad_for_ranks(tokenizer: dict[str, Any], said: dict[str, Any]) -> None:
    """Add the fewest rows to a vocabulary that tensor-parallel ranks can share, in place."""
    ranks = max(said.get("tensor_model_parallel_size") or 1, 1)
    tokenizer["padded_vocab_size"] = -(-tokenizer["padded_vocab_size"] // ranks) * ranks


def _of_groups(
    groups: Iterable[tuple[str, ...]], stored: dict[str, Any], said: dict[str, Any]
) -> dict[str, Any]:
    """Return the stored values of the groups.

    Of a group of which the user gives something only that: it will be replaced, and told.
    """
    return {
        name: stored[name]
        for group in groups
        for name in (said.keys() & set(group) or group)
        if name in stored
    }


def _tokenizer(
    checkpoint: Place, facts: dict[str, Any] | None, said: dict[str, Any], wanted: CheckpointConfig
) -> tuple[dict[str, Any], str]:
    """Return the tokenizer's options and what is wrong with its files, if anything is."""
    if not facts:
        return {}, ""
    own_files = {name for name in _FILES if said.get(name) is not None}
    found = {"tokenizer_type": facts["type"], **facts["settings"]}
    if not wanted.use_tokenizer_model_from_checkpoint_args:
        if facts["files"] and not own_files:
            return {}, ""  # kind and files are those noted beside the data
        return found, ""
    if here := said.keys() & set(_TOKENIZER):
        stored = found | facts["files"]
        return {name: stored[name] for name in here if name in stored}, ""  # told as replaced
    for role, name in facts["files"].items():
        file, problem = _file(checkpoint, role, Path(name), facts["copies"].get(role), wanted)
        if problem:
            return {}, problem
        found[role] = str(file)
    return found, ""


def _file(
    checkpoint: Place, role: str, original: Path, copy: str | None, wanted: CheckpointConfig
) -> tuple[Path, str]:
    """Return where a file of the tokenizer lies now: where it was, else beside the tensors."""
    flag = "--" + role.replace("_", "-")
    if original.exists():
        return original, ""
    if copy is None or not (checkpoint / copy).is_file():
        return original, (
            f"{FLAG}: the tokenizer's file {original} is gone and {checkpoint} holds no copy: give "
            f"{flag}"
        )
    prunes = wanted.keep_last is not None or wanted.save_retain_interval is not None
    if prunes and wanted.save and place(wanted.save).resolve() == checkpoint.parent.resolve():
        return original, (
            f"{FLAG}: the tokenizer's file {original} is gone, and its copy {checkpoint / copy} "
            f"would go with old checkpoints: copy it elsewhere and give {flag} and --tokenizer-type"
        )
    found = checkpoint / copy
    if not isinstance(found, Path):
        return original, (
            f"{FLAG}: the tokenizer's file {original} is gone, and its copy {found} is in an "
            f"object store: copy it to a folder and give {flag} and --tokenizer-type"
        )
    return found, ""
