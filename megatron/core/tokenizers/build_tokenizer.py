"""Options to a tokenizer: each ``--tokenizer-type``, what it needs and what it refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron.core.errors import ConfigError, DataError
from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.byte_tokenizer import ByteTokenizer
from megatron.core.tokenizers.gpt2_bpe_tokenizer import GPT2BPETokenizer
from megatron.core.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron.core.tokenizers.null_tokenizer import NullTokenizer
from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron.core.tokenizers.tiktoken_tokenizer import PATTERNS, TikTokenizer


class TokenizerOptions(Protocol):
    """What ``build_tokenizer`` reads; the training options and ``TokenizerSettings`` have it."""

    @property
    def tokenizer_type(self) -> str | None:
        """Key of ``TOKENIZERS``."""

    @property
    def tokenizer_model(self) -> str | None:
        """File or folder."""

    @property
    def vocab_file(self) -> str | None:
        """File vocab.json."""

    @property
    def merge_file(self) -> str | None:
        """File merges.txt."""

    @property
    def vocab_size(self) -> int | None:
        """Number of ids, as far as the user says it."""

    @property
    def tiktoken_pattern(self) -> str | None:
        """Key of ``tiktoken_tokenizer.PATTERNS``."""

    @property
    def tiktoken_num_special_tokens(self) -> int:
        """Ids in front of a JSON vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Plain ``TokenizerOptions`` for the tools and for sidecars."""

    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = 1000


def build_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Build the tokenizer that the options name.

    Raises:
        ConfigError: The type is unknown, an option it needs is missing, or one it cannot use
            is given.
        DataError: A file is missing, or of another kind.
        BackendError: A package it needs is not installed.
    """
    kind = options.tokenizer_type
    if kind not in TOKENIZERS:
        raise ConfigError(
            f"--tokenizer-type {kind} is not one of {', '.join(TOKENIZERS)}"
            if kind
            else f"--tokenizer-type is missing; one of {', '.join(TOKENIZERS)}"
        )
    needs, build = TOKENIZERS[kind]
    ConfigError.raise_if_any(_problems(options, kind, needs))
    tokenizer = build(options)
    wanted = options.vocab_size
    if wanted is not None and kind not in SIZED_BY_USER and wanted != tokenizer.vocab_size:
        raise DataError(
            f"--vocab-size {wanted} is not the {tokenizer.vocab_size} ids of {kind}"
            f"{_file_list(tokenizer)}; leave --vocab-size out"
        )
    return tokenizer


def _problems(options: TokenizerOptions, kind: str, needs: tuple[str, ...]) -> list[str]:
    problems = []
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        flag = "--" + name.replace("_", "-")
        given = getattr(options, name) is not None
        if name in needs and not given:
            problems.append(f"--tokenizer-type {kind} needs {flag}")
        if given and name not in needs:
            problems.append(f"{flag} has no effect with --tokenizer-type {kind}; leave it out")
    if kind == "NullTokenizer" and (options.vocab_size or 0) < 1:
        problems.append("--tokenizer-type NullTokenizer needs --vocab-size, 1 or more")
    if options.tiktoken_pattern is not None and kind != "TikTokenizer":
        problems.append("--tiktoken-pattern needs --tokenizer-type TikTokenizer")
    if options.tiktoken_pattern not in (None, *PATTERNS):
        problems.append(f"--tiktoken-pattern must be one of {', '.join(PATTERNS)}")
    return problems


def _file_list(tokenizer: Tokenizer) -> str:
    return (
        f" ({', '.join(str(file) for file in tokenizer.files.values())})" if tokenizer.files else ""
    )


def _sentencepiece(options: TokenizerOptions) -> Tokenizer:
    assert options.tokenizer_model, "checked by _problems"
    assert options.tokenizer_type, "checked by build_tokenizer"
    return SentencePieceTokenizer(options.tokenizer_model, options.tokenizer_type)


def _huggingface(options: TokenizerOptions) -> Tokenizer:
    assert options.tokenizer_model, "checked by _problems"
    return HuggingFaceTokenizer(options.tokenizer_model)


def _gpt2_bpe(options: TokenizerOptions) -> Tokenizer:
    assert options.vocab_file, "checked by _problems"
    assert options.merge_file, "checked by _problems"
    return GPT2BPETokenizer(options.vocab_file, options.merge_file)


def _tiktoken(options: TokenizerOptions) -> Tokenizer:
    assert options.tokenizer_model, "checked by _problems"
    return TikTokenizer(
        options.tokenizer_model,
        vocab_size=options.vocab_size,
        pattern=options.tiktoken_pattern,
        num_special_tokens=options.tiktoken_num_special_tokens,
    )


def _byte(options: TokenizerOptions) -> Tokenizer:
    return ByteTokenizer()


def _null(options: TokenizerOptions) -> Tokenizer:
    assert options.vocab_size, "checked by _problems"
    return NullTokenizer(options.vocab_size)


Builder = Callable[[TokenizerOptions], Tokenizer]

# name -> (the file options it needs, how to build it)
TOKENIZERS: dict[str, tuple[tuple[str, ...], Builder]] = {
    "SentencePieceTokenizer": (("tokenizer_model",), _sentencepiece),
    "GPTSentencePieceTokenizer": (("tokenizer_model",), _sentencepiece),
    "Llama2Tokenizer": (("tokenizer_model",), _sentencepiece),
    "HuggingFaceTokenizer": (("tokenizer_model",), _huggingface),
    "GPT2BPETokenizer": (("vocab_file", "merge_file"), _gpt2_bpe),
    "TikTokenizer": (("tokenizer_model",), _tiktoken),
    "ByteTokenizer": ((), _byte),
    "NullTokenizer": ((), _null),
}
# --vocab-size is an input of these; for the others it must agree with the file.
SIZED_BY_USER = ("NullTokenizer", "TikTokenizer")
