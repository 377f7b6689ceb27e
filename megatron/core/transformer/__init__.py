"""Layers of a transformer; names are imported when first used."""

from megatron.core.lazy_exports import lazy_exports

__getattr__ = lazy_exports(
    __name__,
    {
        "ModuleSpec": "megatron.core.transformer.spec_utils",
        "TransformerConfig": "megatron.core.transformer.transformer_config",
    },
)
