"""Streamed parts join to the whole text, and no half character is shown."""

import pytest
import sentencepiece  # noqa: F401 - slow to import the first time

from megatron.core.tokenizers.build_tokenizer import TOKENIZERS, build_tokenizer
from megatron.core.tokenizers.byte_tokenizer import ByteTokenizer
from megatron.core.tokenizers.streaming import StreamingDetokenizer
from tests.helpers.tiny_tokenizers import SOURCE

TEXT_KINDS = [kind for kind in TOKENIZERS if kind != "NullTokenizer"]


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_parts_join_to_the_text(settings, kind):
    tokenizer = build_tokenizer(settings[kind])
    text = SOURCE + " \U0001f389\u6f22 x"
    stream = StreamingDetokenizer(tokenizer)
    parts = [stream.add(token) for token in tokenizer.tokenize(text)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\ufffd" in part for part in parts)


def test_numbers_keep_the_space_between_them(settings):
    tokenizer = build_tokenizer(settings["NullTokenizer"])
    stream = StreamingDetokenizer(tokenizer)
    assert [stream.add(token) for token in (5, 17)] == ["5", " 17"]


def test_what_never_completes_is_shown_at_the_end():
    stream = StreamingDetokenizer(ByteTokenizer())
    assert stream.add(0xE2) == ""
    assert stream.finish() == "\ufffd"


def test_broken_bytes_do_not_hold_back_the_text_for_ever():
    stream = StreamingDetokenizer(ByteTokenizer())
    shown = "".join(stream.add(0x80) for _ in range(9))
    assert len(shown) >= 4
