"""The GPT family; names are imported when first used."""

from megatron.core.lazy_exports import lazy_exports

__getattr__ = lazy_exports(__name__, {"GPTModel": "megatron.core.models.gpt.gpt_model"})
