"""Rotary positions in config.json, as versions 4 and 5 of transformers write them, and our options.

Version 5 has one ``rope_parameters``; version 4 ``rope_theta`` beside ``rope_scaling``. Both are
read, and what is written holds both, so that either version loads it.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.tables import ConfigRow, Fields, Options

_ORIGINAL = "original_max_position_embeddings"
_SAME = {
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_scaling_low_freq_factor",
        "high_freq_factor": "rope_scaling_high_freq_factor",
        _ORIGINAL: "rope_scaling_original_max_position_embeddings",
    },
    "yarn": {
        "factor": "rope_scaling_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "truncate": "yarn_correction_range_round_to_int",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "attention_factor": "rope_attention_factor",
        _ORIGINAL: "rope_scaling_original_max_position_embeddings",
    },
    "longrope": {
        "factor": "rope_scaling_factor",
        "short_factor": "longrope_short_factor",
        "long_factor": "longrope_long_factor",
        "attention_factor": "rope_attention_factor",
        _ORIGINAL: "rope_scaling_original_max_position_embeddings",
    },
}
"""Kind of scaling -> its parameter in config.json -> our option."""
_KINDS = {"default": "none", "su": "longrope"}
_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def rope(theta: float = 10000.0, *, max_positions: int = 2048, **scaling: Any) -> ConfigRow:
    """Return the row of rotary positions.

    Args:
        theta: Base where config.json does not say it.
        max_positions: Longest sequence where config.json does not say it.
        scaling: Scaling where config.json says nothing of rotary positions at all.
    """
    defaults = {
        "rope_parameters": None,
        "rope_scaling": None,
        "rope_theta": None,
        "partial_rotary_factor": None,
        "max_position_embeddings": max_positions,
    }

    def read(fields: Fields) -> dict[str, Any]:
        return _read(fields, theta, scaling)

    return ConfigRow(defaults, read, _write)


def _read(fields: Fields, theta: float, scaling: Mapping[str, Any]) -> dict[str, Any]:
    said = dict(fields["rope_scaling"] or fields["rope_parameters"] or scaling)
    nested = [name for name, value in said.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"config.json: rotary parameters of their own for {', '.join(nested)} are not offered: "
            "all layers have one kind here"
        )
    kind = said.pop("rope_type", None) or said.get("type") or "default"
    said.pop("type", None)
    base = said.pop("rope_theta", None) or fields["rope_theta"] or theta
    share = said.pop("partial_rotary_factor", None) or fields["partial_rotary_factor"] or 1.0
    kind = _KINDS.get(kind, kind)
    found = {
        "position_embedding_type": "rope",
        "rotary_base": int(base) if float(base).is_integer() else base,
        "rotary_percent": share,
        "max_position_embeddings": fields["max_position_embeddings"],
        "rope_scaling_type": kind,
    }
    if kind == "none":
        return found
    if kind not in _SAME:
        raise ConfigError(
            f"config.json: rope type {kind!r} is not offered, only default, {', '.join(_SAME)}"
        )
    names = _SAME[kind]
    if strangers := sorted(said.keys() - names.keys()):
        raise ConfigError(f"config.json: rope type {kind} has no {', '.join(strangers)} here")
    if "truncate" in said:
        said["truncate"] = bool(said["truncate"])  # null is false there, not the default
    said = {name: value for name, value in said.items() if value is not None}
    values = {name: value for name, value in _DEFAULTS.items() if name in names} | said
    if values.get("mscale_all_dim"):  # says nothing alone, where ours has an mscale of 1
        values.setdefault("mscale", 0.0)
    if _ORIGINAL in names:
        values.setdefault(_ORIGINAL, fields["max_position_embeddings"])
    if values.get("factor") is None and _ORIGINAL in names:
        values["factor"] = fields["max_position_embeddings"] / values[_ORIGINAL]
    return found | {names[name]: value for name, value in values.items()}


def _write(options: Options) -> dict[str, Any]:
    if options["position_embedding_type"] != "rope":
        raise ConfigError("--position-embedding-type rope is what this family has")
    kind, base = options["rope_scaling_type"], float(options["rotary_base"])
    scaling = None
    if kind != "none":
        names = _SAME.get(kind)
        if names is None:
            raise ConfigError(f"--rope-scaling-type {kind} has no name in config.json")
        values = {name: options[option] for name, option in names.items()}
        if not values.get("mscale_all_dim", 1):  # then neither has an effect
            values["mscale"] = values["mscale_all_dim"] = None
        scaling = {"rope_type": kind} | {k: v for k, v in values.items() if v is not None}
    parameters = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": base}
    found = {
        "rope_parameters": parameters,
        "rope_theta": base,
        "rope_scaling": scaling,
        "max_position_embeddings": options["max_position_embeddings"],
    }
    if options["rotary_percent"] != 1.0:
        found["partial_rotary_factor"] = options["rotary_percent"]
        parameters["partial_rotary_factor"] = options["rotary_percent"]
    return found
