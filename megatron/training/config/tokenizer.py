"""Options of the tokenizer."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.config_field import derived

TokenizerType = Literal[
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "ByteTokenizer",
    "NullTokenizer",
]


@dataclass(kw_only=True)
class TokenizerConfig:
    """Tokenizer."""

    tokenizer_type: TokenizerType | None = None
    """Kind of tokenizer; the one that preprocessing noted beside the data when not set."""

    tokenizer_model: str | None = None
    """Tokenizer file: a SentencePiece .model, a Hugging Face tokenizer.json or its folder, or a
    tiktoken vocabulary."""

    vocab_file: str | None = None
    """File vocab.json of --tokenizer-type GPT2BPETokenizer."""

    merge_file: str | None = None
    """File merges.txt of --tokenizer-type GPT2BPETokenizer."""

    vocab_size: int | None = None
    """Number of ids of --tokenizer-type NullTokenizer (its end of document is one more), and of
    TikTokenizer with a JSON vocabulary (131072 when not set); for the others it must agree with
    the file when set."""

    tiktoken_pattern: Literal["v1", "v2", "cl100k"] | None = None
    """How --tokenizer-type TikTokenizer cuts text before merging; v2 for a JSON vocabulary and
    cl100k for a .tiktoken file when not set."""

    tiktoken_num_special_tokens: int = 1000
    """Ids in front of a JSON vocabulary of --tokenizer-type TikTokenizer."""

    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times --tensor-model-parallel-size."""

    unpadded_vocab_size: int | None = None
    """Rows of the embedding that are tokens, the first ones: the others pad it, and have no share
    in the softmax. The ids of the tokenizer when not set."""

    padded_vocab_size: int = derived()
    """Rows of the embedding; when not set, the ids padded by --make-vocab-size-divisible-by."""
