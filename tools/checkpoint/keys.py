"""What the name of a stored tensor says: kind, layer, expert; and the order of a model. Pure."""

import re
from typing import NamedTuple

from megatron.core.dist_checkpointing.mapping import MODEL, OPTIMIZER, RNG

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_EXPERT = re.compile(r"^(.*mlp\.experts\.local_experts)\.(\d+)\.(.*)$")
_ROUTER = re.compile(r"^.*mlp\.router\.([^.]+)$")
_ENDS = {"embedding.": 0, "decoder.layers.": 1, "decoder.": 2}
_FLOW = (
    *("word_embeddings", "input_layernorm", "self_attention", "linear_qkv", "linear_proj"),
    *("pre_mlp_layernorm", "router", "fc1_latent_proj", "experts", "fc2_latent_proj"),
    "shared_experts",
)
"""Modules beside each other, as a token meets them; others follow by name."""
_PLACES = {word: place for place, word in enumerate(_FLOW)}


class KeyParts(NamedTuple):
    """A key of a checkpoint, taken apart."""

    kind: str
    """``model``, ``rng``, or the state of the optimizer, such as ``exp_avg``."""
    name: str
    """What it belongs to: the name of a weight or buffer of the model."""
    layer: int | None
    """Global number of its transformer layer."""
    expert: int | None
    """Global id of its expert."""
    router: str | None
    """Name of a tensor of the router with a row for each expert: weight, expert_bias, ..."""

    @property
    def is_optimizer(self) -> bool:
        """Whether it is a state of the optimizer."""
        return self.kind not in ("model", "rng")


def parts_of(key: str) -> KeyParts:
    """Take ``key`` apart."""
    if key.startswith(RNG):
        return KeyParts("rng", key.removeprefix(RNG), None, None, None)
    if key.startswith(MODEL):
        kind, name = "model", key.removeprefix(MODEL)
    else:
        kind, _, name = key.removeprefix(OPTIMIZER).partition(".")
    layer, expert, router = _LAYER.match(name), _EXPERT.match(name), _ROUTER.match(name)
    return KeyParts(
        kind,
        name,
        int(layer[1]) if layer else None,
        int(expert[2]) if expert else None,
        router[1] if router else None,
    )


def with_expert(key: str, expert: int) -> str:
    """Return the key of the same tensor of another expert."""
    found = _EXPERT.match(key)
    assert found is not None, f"{key} is of no expert"
    return f"{found[1]}.{expert}.{found[3]}"


def main_key(key: str) -> str:
    """Return the key of the main weight of the weight ``key``."""
    assert key.startswith(MODEL), f"{key} is no weight"
    return f"{OPTIMIZER}main_param.{key.removeprefix(MODEL)}"


def model_order(key: str) -> tuple[object, ...]:
    """Sort by this: weights before optimizer states before random states, as a token meets them."""
    parts = parts_of(key)
    kind = {"model": "0", "rng": "2"}.get(parts.kind, f"1{parts.kind}")
    place = next((n for prefix, n in _ENDS.items() if parts.name.startswith(prefix)), 3)
    pieces = tuple(
        (0, int(word), "") if word.isdecimal() else (1, _PLACES.get(word, len(_FLOW)), word)
        for word in parts.name.split(".")
    )
    return kind, place, pieces
