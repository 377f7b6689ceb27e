"""What a family consists of: a table of configuration fields and a table of weight names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.core.models.huggingface.model_facts import ModelFacts
from megatron.core.models.huggingface.views import View

Fields = Mapping[str, Any]
"""Fields of a config.json, with the family's defaults for those that it leaves out."""
Options = Mapping[str, Any]
"""Options of a model, with the defaults of those that are not given."""


@dataclass(frozen=True)
class ConfigRow:
    """Some fields of config.json and what they mean here."""

    defaults: Mapping[str, Any]
    """Field -> what transformers takes where config.json does not say it."""
    read: Callable[[Fields], dict[str, Any]]
    """Fields to options; raises ConfigError for what cannot be built."""
    write: Callable[[Options], dict[str, Any]]
    """Options to fields."""


@dataclass(frozen=True)
class Placement:
    """Where the parts of a tensor on disk lie in ours."""

    hf_shape: tuple[int, ...]
    """Of the tensor on disk."""
    pieces: tuple[tuple[View, str, View, tuple[int, ...]], ...]
    """View of the tensor on disk, our key, view of ours, shape of ours."""


@dataclass(frozen=True)
class Place:
    """Which layer and expert a row of the weight table is filled in for."""

    layer: int = -1
    expert: int = -1


@dataclass(frozen=True)
class Weight:
    """A row of the table of weights: one tensor on disk, or one for each layer or expert."""

    hf: str
    """Its name, with ``{layer}`` and ``{expert}``."""
    key: str
    """Our key, in which a transform may replace ``{part}``."""
    transform: Callable[["Weight", ModelFacts, Place], Placement]
    when: Callable[[ModelFacts], bool] = lambda facts: True
    """Whether a model has it."""
    layers: str = "all"
    """Of which layers: ``all``, ``dense`` or ``moe``."""
    is_fp32: bool = False
    """Kept in fp32 here whatever the number format."""


@dataclass(frozen=True)
class Family:
    """Models of one kind at Hugging Face."""

    name: str
    title: str
    """As people call it."""
    model_types: tuple[str, ...]
    """``model_type`` of config.json; the first is written."""
    architecture: str
    """Class of transformers that is written to ``architectures``."""
    constants: Mapping[str, Any]
    """Options that all models of the family have."""
    rows: tuple[ConfigRow, ...]
    weights: tuple[Weight, ...]
    base_prefix: str = "model."
    """Of the names of all weights but the output layer's; files of the bare model leave it out."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other name of a field of config.json -> its name in ``rows``."""
    ignored_fields: frozenset[str] = frozenset()
    """Fields of config.json that do not change the function, beyond those of all families."""
    ignored_keys: tuple[str, ...] = ()
    """Patterns of tensors on disk that are no weights."""
    prediction_weights: tuple[Weight, ...] = ()
    """What layers behind the last of the model have beside those of a layer, where they are for
    multi-token prediction: ``{layer}`` is their number on disk, ``{depth}`` theirs from 0."""
    prediction_repeats: Mapping[str, str] = field(default_factory=dict)
    """What such a layer has twice on disk -> the tensor that it repeats."""
    notes: tuple[str, ...] = field(default=())
    """What is refused or particular, for the documentation."""
