"""Rows of mixtures of experts: which layers have them, how wide they are, how tokens choose."""

from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.tables import ConfigRow, Fields, Options


def expert_width(name: str, default: int) -> ConfigRow:
    """Return the row of the width of experts, in a family without dense layers."""
    return ConfigRow(
        {name: default},
        lambda fields: {"ffn_hidden_size": fields[name]},
        lambda options: {name: options["moe_ffn_hidden_size"] or options["ffn_hidden_size"]},
    )


def everywhere(experts: str, default: int) -> ConfigRow:
    """Return the row of the number of experts, the same in all layers."""

    def write(options: Options) -> dict[str, Any]:
        _refuse_dense(options)
        return {experts: options["num_moe_experts"]}

    return ConfigRow(
        {experts: default},
        lambda fields: {"num_moe_experts": fields[experts], "moe_layer_freq": 1},
        write,
    )


def _refuse_dense(options: Options) -> None:
    freq = options["moe_layer_freq"]
    if options["num_moe_experts"] is None:
        raise ConfigError("a dense model has no experts: --num-experts is not set")
    if freq != 1 and not (isinstance(freq, list) and all(freq)):
        raise ConfigError(f"--moe-layer-freq {freq}: all layers of this family have experts")


def sparse_steps(experts: str, default: int) -> ConfigRow:
    """Return the row of Qwen: every so many layers have experts, but for those that are listed."""

    def read(fields: Fields) -> dict[str, Any]:
        step, dense = fields["decoder_sparse_step"], fields["mlp_only_layers"] or []
        layers = fields["num_hidden_layers"]
        pattern = [int((n + 1) % step == 0 and n not in dense) for n in range(layers)]
        return {
            "num_moe_experts": fields[experts],
            "moe_layer_freq": 1 if all(pattern) else pattern,
        }

    def write(options: Options) -> dict[str, Any]:
        return {
            experts: options["num_moe_experts"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [n for n, moe in enumerate(pattern_of(options)) if not moe],
        }

    defaults = {
        experts: default,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "num_hidden_layers": None,
    }
    return ConfigRow(defaults, read, write)


def first_dense(default: int) -> ConfigRow:
    """Return the row of DeepSeek: the first layers are dense, all others have experts."""

    def read(fields: Fields) -> dict[str, Any]:
        dense, layers = fields["first_k_dense_replace"], fields["num_hidden_layers"]
        if fields["moe_layer_freq"] != 1:
            raise ConfigError(
                f"config.json: moe_layer_freq {fields['moe_layer_freq']} is not offered, only 1"
            )
        pattern = [int(layer >= dense) for layer in range(layers)]
        return {"moe_layer_freq": 1 if all(pattern) else pattern}

    def write(options: Options) -> dict[str, Any]:
        pattern = pattern_of(options)
        dense = pattern.index(1) if 1 in pattern else len(pattern)
        if not all(pattern[dense:]):
            raise ConfigError(
                f"--moe-layer-freq {pattern}: behind its first dense layers this family has "
                "experts in every layer"
            )
        return {"first_k_dense_replace": dense, "moe_layer_freq": 1}

    defaults = {
        "first_k_dense_replace": default,
        "moe_layer_freq": 1,
        "num_hidden_layers": None,
    }
    return ConfigRow(defaults, read, write)


def pattern_of(options: Options) -> list[int]:
    """Return 1 for each layer with experts and 0 for each dense one."""
    freq, layers = options["moe_layer_freq"], options["num_layers"]
    if options["num_moe_experts"] is None:
        return [0] * layers
    if isinstance(freq, int):
        return [int(layer % freq == 0) for layer in range(layers)]
    return [int(bool(entry)) for entry in freq]


def renormalised(default: bool) -> ConfigRow:
    """Return the row of ``norm_topk_prob`` where scores are a softmax."""
    return ConfigRow(
        {"norm_topk_prob": default},
        lambda fields: {"moe_router_pre_softmax": not fields["norm_topk_prob"]},
        lambda options: {"norm_topk_prob": not options["moe_router_pre_softmax"]},
    )


def shared_width(number: str, width: str, default: int) -> ConfigRow:
    """Return the row of shared experts that are said as their number and the width of one."""
    whole = "moe_shared_expert_intermediate_size"

    def read(fields: Fields) -> dict[str, Any]:
        count = fields[number] or 0
        if not count:
            raise ConfigError(f"config.json: {number} {fields[number]} is not offered: at least 1")
        return {whole: count * fields[width]}

    def write(options: Options) -> dict[str, Any]:
        size, one = options[whole] or 0, options["moe_ffn_hidden_size"]
        if not size or size % one:
            raise ConfigError(
                f"--moe-shared-expert-intermediate-size {size} must be a multiple, at least 1, of "
                f"--moe-ffn-hidden-size {one} in this family"
            )
        return {number: size // one}

    return ConfigRow({number: default, width: None}, read, write)


def groups(default: tuple[int | None, int | None]) -> ConfigRow:
    """Return the row of groups of experts, of which a token may use some; one group is none."""

    def read(fields: Fields) -> dict[str, Any]:
        count, used = fields["n_group"], fields["topk_group"]
        if (count or 1) == 1:
            return {"moe_router_num_groups": None, "moe_router_group_topk": None}
        return {"moe_router_num_groups": count, "moe_router_group_topk": used}

    return ConfigRow(
        {"n_group": default[0], "topk_group": default[1]},
        read,
        lambda options: {
            "n_group": options["moe_router_num_groups"] or 1,
            "topk_group": options["moe_router_group_topk"] or 1,
        },
    )
