"""Sliding windows in config.json: one for all layers, or a kind for each layer."""

from collections.abc import Sequence
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.tables import ConfigRow, Fields, Options

_FULL, _SLIDING = "full_attention", "sliding_attention"


def one_window(default: int | None) -> ConfigRow:
    """Return the row of ``sliding_window``, the same for all layers; None is none."""

    def read(fields: Fields) -> dict[str, Any]:
        size = fields["sliding_window"]
        return {"window_size": _ours(size), "window_attn_skip_freq": None}

    def write(options: Options) -> dict[str, Any]:
        _refuse_pattern(options)
        return {"sliding_window": _theirs(options["window_size"])}

    return ConfigRow({"sliding_window": default}, read, write)


def qwen2_windows(*, is_moe: bool = False) -> ConfigRow:
    """Return the row of Qwen2, Qwen3 and Qwen2-MoE.

    Where config.json does not say the kind of each layer, and windows are on, the layers from
    ``max_window_layers`` on have one; of Qwen2-MoE every second one of those before it.
    """
    defaults = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "num_hidden_layers": None,
    }

    def slides(layer: int, first: int) -> bool:
        return layer % 2 == 0 and layer < first if is_moe else layer >= first

    def read(fields: Fields) -> dict[str, Any]:
        size = fields["sliding_window"] if fields["use_sliding_window"] else None
        kinds = fields["layer_types"]
        if kinds is None:
            layers, first = fields["num_hidden_layers"], fields["max_window_layers"]
            kinds = [_SLIDING if size and slides(n, first) else _FULL for n in range(layers)]
        return by_kinds(size, kinds)

    def write(options: Options) -> dict[str, Any]:
        size, kinds = to_kinds(options)
        return {
            "use_sliding_window": size is not None,
            "sliding_window": size,
            "max_window_layers": kinds.index(_SLIDING) if _SLIDING in kinds else len(kinds),
            "layer_types": kinds,
        }

    return ConfigRow(defaults, read, write)


def alternating(default: int) -> ConfigRow:
    """Return the row of GPT-OSS: a kind for each layer, every second one full if not said."""
    defaults = {"sliding_window": default, "layer_types": None, "num_hidden_layers": None}

    def read(fields: Fields) -> dict[str, Any]:
        kinds = fields["layer_types"]
        if kinds is None:
            kinds = [_FULL if n % 2 else _SLIDING for n in range(fields["num_hidden_layers"])]
        return by_kinds(fields["sliding_window"], kinds)

    def write(options: Options) -> dict[str, Any]:
        size, kinds = to_kinds(options)
        return {"sliding_window": size, "layer_types": kinds}

    return ConfigRow(defaults, read, write)


def switched() -> ConfigRow:
    """Return the row of Qwen3-MoE: the same window in all layers, which has to be switched on."""

    def read(fields: Fields) -> dict[str, Any]:
        size = fields["sliding_window"] if fields["use_sliding_window"] else None
        return {"window_size": _ours(size), "window_attn_skip_freq": None}

    def write(options: Options) -> dict[str, Any]:
        _refuse_pattern(options)
        size = _theirs(options["window_size"])
        return {"use_sliding_window": size is not None, "sliding_window": size}

    return ConfigRow({"use_sliding_window": False, "sliding_window": 4096}, read, write)


def _refuse_pattern(options: Options) -> None:
    if options["window_attn_skip_freq"] is not None:
        raise ConfigError(
            f"--window-attn-skip-freq {options['window_attn_skip_freq']}: this family has the "
            "same window in all layers"
        )


def by_kinds(size: int | None, kinds: Sequence[str]) -> dict[str, Any]:
    """Return our options of a window and the kind of each layer."""
    if strangers := sorted(set(kinds) - {_FULL, _SLIDING}):
        raise ConfigError(f"config.json: layer_types {', '.join(strangers)} are not offered")
    slides = [int(kind == _SLIDING) for kind in kinds]
    if not any(slides):
        return {"window_size": None, "window_attn_skip_freq": None}
    if not size:
        raise ConfigError("config.json: layer_types name sliding layers, and sliding_window none")
    return {
        "window_size": _ours(size),
        "window_attn_skip_freq": None if all(slides) else slides,
    }


def to_kinds(options: Options) -> tuple[int | None, list[str]]:
    """Return the window and the kind of each layer that our options mean."""
    size, skip = _theirs(options["window_size"]), options["window_attn_skip_freq"]
    layers = options["num_layers"]
    if size is None:
        return None, [_FULL] * layers
    if skip is None:
        slides = [1] * layers
    elif isinstance(skip, int):
        slides = [int((layer + 1) % skip != 0) for layer in range(layers)]
    else:
        slides = list(skip)
    return size, [_SLIDING if slide else _FULL for slide in slides]


def _ours(size: int | None) -> list[int] | None:
    """Return Megatron's window: so many before the query, none behind; theirs counts itself."""
    return [size - 1, 0] if size else None


def _theirs(window: Sequence[int] | None) -> int | None:
    return None if window is None or window[0] < 0 else window[0] + 1
