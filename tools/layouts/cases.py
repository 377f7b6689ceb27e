"""From a user's flags to runs that can be compared: resolved by the rules of the configuration.

What a run reads or writes is left out, and so are sizes of parallel axes, for those are what is
tried. The flags of a layout go on top; whatever is wrong with them is what ``resolve`` says.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from megatron.core.errors import ConfigError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.training.config.flags import Given, read_command_line
from megatron.training.config.options import Option, options_of
from megatron.training.config.resolve import resolve
from megatron.training.config.run_config import RunConfig
from tools.layouts.axes import OWN, Level, Shape

_DEFAULT = """
    --num-layers 4 --hidden-size 16 --num-attention-heads 4 --ffn-hidden-size 24 --swiglu
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss seq_aux_loss
    --moe-aux-loss-coeff 0.02 0.05 --moe-z-loss-coeff 0.001 --init-method-std 0.2
    --seq-length 16 --vocab-size 63 --micro-batch-size 2 --global-batch-size 8
"""
DEFAULT_WORDS = tuple(_DEFAULT.split())
"""The model when no flag is given."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "clip_grad": 0.0},
    # eps well above rounding: Adam divides tiny gradients by their size
    "adam": {
        "optimizer": "adam",
        "lr": 1e-3,
        "adam_eps": 1e-3,
        "clip_grad": 0.1,
        "weight_decay": 0.1,
    },
}
"""What steps are made with. A wrong scale shows in the weights of SGD; Adam hides it."""

_KEPT_SECTIONS = ("model", "training", "data", "tokenizer")
_KEPT_OF_DATA = ("seq_length",)
_NOT_MODEL = """
    train_iters exit_interval exit_duration_in_mins skip_train
    tokenizer_type tokenizer_model vocab_file merge_file tiktoken_pattern
    tiktoken_num_special_tokens make_vocab_size_divisible_by
    moe_enable_routing_replay bf16 fp16 fp64
"""
_LAYOUT = """
    recompute_granularity recompute_method recompute_num_layers recompute_modules
    moe_token_dispatcher_type
"""
_SIZES = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_PRECISION: dict[str, dict[str, Any]] = {"fp64": {"fp64": True}, "fp32": {}, "bf16": {"bf16": True}}
DEFAULT_VOCAB = 128


class Base(NamedTuple):
    """The user's model, as one process trains it."""

    values: dict[str, Any]
    """Field name -> value, of all that is not left to be derived."""
    own_layout: Level | None
    """The user's flags of parallelism, overlap and recomputation; None when there are none."""


def read_base(words: Sequence[str], dtype: str) -> Base:
    """Read the user's flags and keep what concerns the model.

    Raises:
        ConfigError: Flags are unknown or their values cannot be read.
    """
    options = options_of(RunConfig)
    given = read_command_line(words, options)
    ConfigError.raise_if_any(given.problems)
    values = {
        name: value
        for name, value in given.values.items()
        if options[name].section in _KEPT_SECTIONS
        and (options[name].section != "data" or name in _KEPT_OF_DATA)
        and name not in _NOT_MODEL.split()
        and not _is_layout(options[name])
    }
    values |= _PRECISION[dtype] | {"mock_data": True, "tokenizer_type": "NullTokenizer"}
    vocab = values.pop("padded_vocab_size", None) or values.get("vocab_size", DEFAULT_VOCAB - 1) + 1
    values |= {"vocab_size": vocab - 1, "padded_vocab_size": vocab}
    values.setdefault("micro_batch_size", 2)
    values.setdefault("global_batch_size", 4 * values["micro_batch_size"])
    values |= {"lr_decay_style": "constant", "train_iters": 100}
    own = {n: v for n, v in given.values.items() if _is_layout(options[n])}
    return Base(values, _level_of(own, options) if own else None)


def _level_of(own: Mapping[str, Any], options: Mapping[str, Option]) -> Level:
    words = [word for name, value in own.items() for word in options[name].show(value).split()]
    sizes = {axis: own[name] for axis, name in _SIZES.items() if name in own}
    return Level(OWN, OWN, tuple(words), sizes)


def _is_layout(option: Option) -> bool:
    """Return whether an option changes how a model is trained, and not what comes out."""
    sizes = {entry.name for entry in fields(ModelParallelConfig)}
    return option.section == "ddp" or option.name in sizes | set(_LAYOUT.split())


def shape_of(values: Mapping[str, Any]) -> Shape:
    """Return what levels are chosen by."""
    config = config_of(values, [], 1, "sgd")
    return Shape(
        config.model.num_layers,
        config.model.num_attention_heads,
        config.training.micro_batch_size,
        config.training.global_batch_size,
        not config.model.untie_embeddings_and_output_weights,
    )


def config_of(
    values: Mapping[str, Any], words: Iterable[str], world_size: int, optimizer: str
) -> RunConfig:
    """Resolve a run of ``values`` with the options ``words`` on top, on ``world_size`` ranks.

    Raises:
        ConfigError: The rules of the configuration refuse it.
    """
    options = options_of(RunConfig)
    base = Given(values={**values, **OPTIMIZERS[optimizer]})
    sources = {"yaml": base, "cli": read_command_line(words, options)}
    return resolve(sources, options, world_size)


def reasons_against(values: Mapping[str, Any], words: Iterable[str], world_size: int) -> list[str]:
    """Return what the rules say against a layout, nothing when it may run."""
    try:
        config_of(values, words, world_size, "sgd")
    except ConfigError as error:
        return list(error.problems)
    return []
