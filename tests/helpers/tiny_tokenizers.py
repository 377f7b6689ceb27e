"""Tokenizer files small enough to make in a test."""

import base64
import io
import json
from pathlib import Path

import sentencepiece

SOURCE = '''def area(radius, *, unit="cm"):
\t"""Return the area; caf\u00e9 \u6f22\u5b57."""
    if radius  <  0:
        raise ValueError(f"radius {radius} is negative")
    return 3.14159 * radius ** 2


class Shape:
    pass
'''
# GPT-2's printable stand-ins of the 256 bytes
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_NAMES = [
    chr(byte) if byte in _PRINTABLE else chr(256 + n)
    for byte, n in zip(
        range(256), [sum(b not in _PRINTABLE for b in range(x)) for x in range(256)], strict=True
    )
]


def sentencepiece_model(path: Path, *, exact: bool = True, **options: object) -> Path:
    """Train on SOURCE as tools/train_tokenizer.py does, or with SentencePiece's defaults."""
    keep = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "user_defined_symbols": ["\n", "\t"],
        "vocab_size": 310,
        "model_type": "bpe",
    }
    loose = {"vocab_size": 60, "model_type": "unigram", "hard_vocab_limit": False}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.split("\n") * 3),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{**(keep if exact else loose), **options},
    )
    path.write_bytes(model.getvalue())
    return path


def gpt2_files(folder: Path) -> tuple[Path, Path]:
    """Write vocab.json (256 bytes, two merges, the end of document) and merges.txt."""
    tokens = [*BYTE_NAMES, "de", "def", "<|endoftext|>"]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: n for n, token in enumerate(tokens)}), encoding="utf-8")
    merges.write_text("#version: 0.2\nd e\nde f\n", encoding="utf-8")
    return vocab, merges


def huggingface_file(folder: Path, *, bos: bool = False) -> Path:
    """Write a byte-level BPE tokenizer.json with <s> and </s>, <s> first if ``bos``."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab = {token: n for n, token in enumerate([*BYTE_NAMES, "de", "<s>", "</s>"])}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("d", "e")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>"])
    if bos:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    path = folder / "tokenizer.json"
    model.save(str(path))
    return path


def tiktoken_files(folder: Path) -> tuple[Path, Path]:
    """Write the 256 bytes and one merge as a JSON list and as a .tiktoken file."""
    tokens = [*(bytes([n]) for n in range(256)), b"de"]
    words = [base64.b64encode(token).decode() for token in tokens]
    as_json, as_ranks = folder / "vocab.json", folder / "vocab.tiktoken"
    entries = [{"rank": n, "token_bytes": w, "token_str": None} for n, w in enumerate(words)]
    as_json.write_text(json.dumps(entries))
    as_ranks.write_text("".join(f"{word} {n}\n" for n, word in enumerate(words)))
    return as_json, as_ranks
