"""One tokenizer of each kind, built once."""

import pytest

from megatron.core.tokenizers.build_tokenizer import TokenizerSettings
from tests.helpers import tiny_tokenizers


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """``--tokenizer-type`` to options that build it from tiny files."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = str(tiny_tokenizers.sentencepiece_model(folder / "T.model"))
    (folder / "gpt2").mkdir()
    vocab, merges = tiny_tokenizers.gpt2_files(folder / "gpt2")
    as_json, _ = tiny_tokenizers.tiktoken_files(folder)
    options = {
        "SentencePieceTokenizer": {"tokenizer_model": model},
        "GPTSentencePieceTokenizer": {"tokenizer_model": model},
        "Llama2Tokenizer": {"tokenizer_model": model},
        "HuggingFaceTokenizer": {
            "tokenizer_model": str(tiny_tokenizers.huggingface_file(folder, bos=True))
        },
        "GPT2BPETokenizer": {"vocab_file": str(vocab), "merge_file": str(merges)},
        "TikTokenizer": {"tokenizer_model": str(as_json)},
        "ByteTokenizer": {},
        "NullTokenizer": {"vocab_size": 70000},
    }
    return {
        kind: TokenizerSettings(tokenizer_type=kind, **given) for kind, given in options.items()
    }
