"""Which tensor on disk becomes which of ours, element by element: a function of options."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.core.models.huggingface.model_facts import ModelFacts
from megatron.core.models.huggingface.tables import Family, Place, Weight
from megatron.core.models.huggingface.views import Piece, num_elements

_TIED = ("lm_head.weight",)
_LAYER = "decoder.layers.{layer}."


@dataclass(frozen=True)
class WeightPlan:
    """All tensors of a model, on both sides, and how their elements correspond."""

    family: Family
    hf_shapes: Mapping[str, tuple[int, ...]]
    """Name on disk -> shape, in the order in which they are written."""
    shapes: Mapping[str, tuple[int, ...]]
    """Our key, without ``model.`` -> shape, padded rows of the vocabulary included."""
    pieces: tuple[Piece, ...]
    fp32_keys: frozenset[str]
    """Our keys that are fp32 in any number format."""
    num_layers: int
    """Of the model, without those for multi-token prediction."""
    copies: Mapping[str, str]
    """Name on disk -> name of the tensor that it repeats, in files that have it twice."""
    repeats: Mapping[str, str]
    """Those of ``copies`` that are written."""

    @cached_property
    def pieces_of_key(self) -> Mapping[str, tuple[Piece, ...]]:
        """Our key -> what it is made of."""
        found: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault(piece.key, []).append(piece)
        return {key: tuple(pieces) for key, pieces in found.items()}

    @cached_property
    def pieces_of_hf_key(self) -> Mapping[str, tuple[Piece, ...]]:
        """Name on disk -> what it is made of."""
        found: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault(piece.hf_key, []).append(piece)
        return {key: tuple(pieces) for key, pieces in found.items()}

    def is_ignored(self, hf_key: str) -> bool:
        """Tell whether a tensor on disk is known to be no weight."""
        layer = re.match(r"(?:model\.)?layers\.(\d+)\.", hf_key)
        if self.family.prediction_weights and layer and int(layer[1]) >= self.num_layers:
            return True
        return any(re.fullmatch(pattern, hf_key) for pattern in self.family.ignored_keys)

    def padding_of(self, key: str) -> int:
        """Return how many elements of one of our tensors come from nowhere and are zero."""
        made = sum(num_elements(piece.ours) for piece in self.pieces_of_key[key])
        return math.prod(self.shapes[key]) - made


def weight_plan(
    family: Family, options: Mapping[str, Any], *, vocab_size: int | None = None
) -> WeightPlan:
    """Plan the exchange of all weights of a model.

    Args:
        family: Its table of weights.
        options: Of the model; ``padded_vocab_size`` is the number of rows of our embedding.
        vocab_size: Rows on disk; as many as ours when None.
    """
    rows = options["padded_vocab_size"] if vocab_size is None else vocab_size
    facts = ModelFacts.of({**options, "vocab_size": rows})
    hf_shapes: dict[str, tuple[int, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: list[Piece] = []
    fp32_keys: set[str] = set()
    num_layers = facts.config.num_layers
    for weight in (*family.weights, *family.prediction_weights):
        if not weight.when(facts):
            continue
        for place in _places(weight, facts):
            hf_key = _filled(weight.hf, place, num_layers)
            placement = weight.transform(weight, facts, place)
            assert hf_key not in hf_shapes, f"two rows for {hf_key}"
            hf_shapes[hf_key] = placement.hf_shape
            for on_disk, key, ours, shape in placement.pieces:
                key = _filled(key, place, num_layers)
                assert shapes.setdefault(key, shape) == shape, f"two shapes for {key}"
                pieces.append(Piece(hf_key, on_disk, key, ours))
                if weight.is_fp32:
                    fp32_keys.add(key)
    embedding = family.weights[0].hf
    is_tied = not facts["untie_embeddings_and_output_weights"]
    repeats = {
        _filled(name, place, num_layers): embedding if is_tied else original
        for name, original in family.prediction_repeats.items()
        for place in _prediction_places(facts)
    }
    return WeightPlan(
        family=family,
        hf_shapes=hf_shapes,
        shapes=shapes,
        pieces=tuple(pieces),
        fp32_keys=frozenset(fp32_keys),
        num_layers=num_layers,
        copies=repeats | (dict.fromkeys(_TIED, embedding) if is_tied else {}),
        repeats=repeats,
    )


def _places(weight: Weight, facts: ModelFacts) -> Iterator[Place]:
    """Yield what a row is filled in for: once, for each layer, or for each expert."""
    if "{layer}" not in weight.hf:
        yield Place()
        return
    pattern = facts.config.moe_layer_pattern
    layers = [] if "{depth}" in weight.key else list(enumerate(pattern))
    layers += [(place.layer, pattern[-1]) for place in _prediction_places(facts)]
    for layer, is_moe in layers:
        if weight.layers != "all" and is_moe != (weight.layers == "moe"):
            continue
        if "{expert}" not in weight.hf:
            yield Place(layer)
            continue
        for expert in range(facts.num_experts_of(layer)):
            yield Place(layer, expert)


def _prediction_places(facts: ModelFacts) -> list[Place]:
    """Return the layers for multi-token prediction, which are numbered on behind the last."""
    last = facts.config.num_layers
    return [Place(layer) for layer in range(last, last + (facts["mtp_num_layers"] or 0))]


def _filled(name: str, place: Place, num_layers: int) -> str:
    depth = place.layer - num_layers
    if depth >= 0:
        name = name.replace(_LAYER, "mtp.layers.{depth}.transformer_layer.")
        name = name.replace("{depth}", str(depth))
    return name.replace("{layer}", str(place.layer)).replace("{expert}", str(place.expert))
