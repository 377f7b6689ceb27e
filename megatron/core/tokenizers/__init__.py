"""Text to ids and back."""

from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.build_tokenizer import TokenizerSettings, build_tokenizer
from megatron.core.tokenizers.streaming import StreamingDetokenizer

__all__ = ["StreamingDetokenizer", "Tokenizer", "TokenizerSettings", "build_tokenizer"]
