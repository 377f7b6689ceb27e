"""What the plan of weights must know of a model: sizes, and what its layers are made of. Pure.

Options of a model are field names of RunConfig's model section (and ``padded_vocab_size``).
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from megatron.core.transformer.config.rotary import written_out
from megatron.core.transformer.transformer_config import TransformerConfig

_FIELDS = {entry.name: entry for entry in fields(TransformerConfig)}


def default_of(name: str) -> Any:
    """Return the default of an option of the model."""
    entry = _FIELDS[name]
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` and the defaults of all others of the model; scaling is written out."""
    defaults = {name: default_of(name) for name in _FIELDS}
    found = defaults | {"padded_vocab_size": None} | dict(options)
    return found | written_out(found)


@dataclass(frozen=True)
class ModelFacts:
    """A model as the plan of weights sees it."""

    options: Mapping[str, Any]
    """All options, defaults included."""
    config: TransformerConfig
    """The same; its properties are the derived sizes."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "ModelFacts":
        """Derive the facts from options of a model; those left out have their defaults."""
        known = {name: value for name, value in options.items() if name in _FIELDS}
        return cls(with_defaults(options), TransformerConfig(**known))

    def __getitem__(self, option: str) -> Any:
        return self.options[option]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.config.num_attention_heads

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.config.query_groups

    def num_experts_of(self, layer: int) -> int:
        """Return the experts of a layer; those behind the last are as the last."""
        last = self.config.num_layers - 1
        return self.config.for_layer(min(layer, last)).num_moe_experts or 0
