"""Each --tokenizer-type builds, keeps text, and says clearly what is wrong with its options."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from megatron.core.errors import BackendError, ConfigError, DataError, MegatronError
from megatron.core.tokenizers import base
from megatron.core.tokenizers.build_tokenizer import (
    TOKENIZERS,
    TokenizerSettings,
    build_tokenizer,
)
from megatron.core.tokenizers.byte_tokenizer import ByteTokenizer
from tests.helpers.tiny_tokenizers import SOURCE

TEXT_KINDS = [kind for kind in TOKENIZERS if kind != "NullTokenizer"]
ODD_TEXTS = [
    SOURCE,
    "a\r\nb\rc\n\n\n",
    "  two  spaces \t\ttabs\x0c ",
    "caf\u00e9 \u6f22\u5b57 \U0001f389 \u2028 \ufeff",
    "\u2581 \u2581\u2581x",
    "\ufffd",
    "nul \x00 byte",
    "<s></s><unk><0x0A><eod>",
    "\n",
    " ",
]


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_every_text_comes_back_exactly(settings, kind):
    tokenizer = build_tokenizer(settings[kind])
    for text in ODD_TEXTS:
        if kind == "HuggingFaceTokenizer":  # its files may name texts that are special tokens
            text = text.replace("<s>", "").replace("</s>", "")
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize([*ids, tokenizer.eod]) == text, (kind, text)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.eod not in ids
        assert np.array_equal(tokenizer.tokenize_array(text), ids)


def test_bytes_keep_every_character():
    text = "".join(map(chr, [*range(0, 0xD800, 5), *range(0xE000, 0x110000, 7)]))
    assert ByteTokenizer().detokenize(ByteTokenizer().tokenize(text)) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_end_of_document_is_an_id(settings, kind):
    tokenizer = build_tokenizer(settings[kind])
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert tokenizer.name == kind
    assert len(tokenizer.fingerprint()) == 64


def test_fingerprints_tell_tokenizers_apart_but_not_their_other_names(settings):
    prints = {kind: build_tokenizer(settings[kind]).fingerprint() for kind in TOKENIZERS}
    assert prints["Llama2Tokenizer"] == prints["SentencePieceTokenizer"]
    assert len(set(prints.values())) == len(prints) - 2
    other = dataclasses.replace(settings["NullTokenizer"], vocab_size=7)
    assert build_tokenizer(other).fingerprint() != prints["NullTokenizer"]


def test_a_built_tokenizer_builds_again_from_its_files_and_settings(settings):
    for kind, options in settings.items():
        first = build_tokenizer(options)
        files = {role: str(path) for role, path in first.files.items()}
        again = TokenizerSettings(tokenizer_type=first.name, **files, **first.settings)
        assert build_tokenizer(again).fingerprint() == first.fingerprint(), kind


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_an_id_out_of_the_vocabulary_is_named(settings, kind):
    tokenizer = build_tokenizer(settings[kind])
    with pytest.raises(DataError, match=f"id {tokenizer.vocab_size} is not in the vocabulary"):
        tokenizer.detokenize([0, tokenizer.vocab_size])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tokenizer-type is missing"),
        ({"tokenizer_type": "Bert"}, "--tokenizer-type Bert is not one of Sent"),
        ({"tokenizer_type": "SentencePieceTokenizer"}, "needs --tokenizer-model"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, "needs --vocab-file\n.*needs --merge-file"),
        ({"tokenizer_type": "NullTokenizer"}, "NullTokenizer needs --vocab-size"),
        ({"tokenizer_type": "ByteTokenizer", "vocab_file": "v"}, "--vocab-file has no effect"),
        ({"tokenizer_type": "ByteTokenizer", "vocab_size": 9}, "--vocab-size 9 is not the 257"),
        ({"tokenizer_type": "ByteTokenizer", "tiktoken_pattern": "v1"}, "needs --tokenizer-type"),
        ({"tokenizer_type": "TikTokenizer", "tokenizer_model": "gone.json"}, "does not exist"),
        ({"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "/"}, "is a folder"),
        ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/"}, "without a tokenizer"),
        ({"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "gone"}, "gone does not exist"),
    ],
)
def test_bad_options_are_answered_in_the_users_flags(options, message):
    with pytest.raises(MegatronError, match=f"(?s){message}"):
        build_tokenizer(TokenizerSettings(**options))


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if TOKENIZERS[kind][0]])
@pytest.mark.parametrize("content", [b"", b"plain text\n", b'{"a": 1}', b"[1, 2]", b"\xff\xfe\x00"])
def test_a_file_of_another_kind_is_named(tmp_path, kind, content):
    path = tmp_path / "wrong.file"
    path.write_bytes(content)
    files = dict.fromkeys(TOKENIZERS[kind][0], str(path))
    with pytest.raises(DataError, match=r"wrong\.file"):
        build_tokenizer(TokenizerSettings(tokenizer_type=kind, **files))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_a_missing_package_is_named_with_what_to_install(settings, kind, monkeypatch):
    def missing(package):
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(base.importlib, "import_module", missing)
    with pytest.raises(BackendError, match=r"needs the package .*: pip install .*, or use --tok"):
        build_tokenizer(settings[kind])


def test_importing_tokenizers_needs_neither_torch_nor_optional_packages():
    code = (
        "import sys, megatron.core.tokenizers, megatron.core.datasets.indexed_dataset\n"
        "heavy = {'torch', 'sentencepiece', 'tokenizers', 'tiktoken', 'pyarrow', 'zstandard'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="tokenizer-type"):
        build_tokenizer(TokenizerSettings())
    assert issubclass(ConfigError, ValueError)
