"""Hugging Face, GPT-2 and tiktoken files: the ids, the end of document, what is refused."""

import json

import pytest

from megatron.core.errors import DataError
from megatron.core.tokenizers.gpt2_bpe_tokenizer import GPT2BPETokenizer
from megatron.core.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron.core.tokenizers.null_tokenizer import NullTokenizer
from megatron.core.tokenizers.tiktoken_tokenizer import TikTokenizer
from tests.helpers.tiny_tokenizers import gpt2_files, huggingface_file, tiktoken_files


def test_gpt2_merges_in_the_order_of_its_file(tmp_path):
    tokenizer = GPT2BPETokenizer(*gpt2_files(tmp_path))
    assert tokenizer.tokenize("def de") == [257, tokenizer.tokenize(" ")[0], 256]
    assert tokenizer.eod == 258
    assert tokenizer.vocab_size == 259


def test_gpt2_names_the_line_of_a_bad_merge(tmp_path):
    vocab, merges = gpt2_files(tmp_path)
    merges.write_text("#version: 0.2\nd e\nq q\n")
    with pytest.raises(DataError, match=r"merges.txt:3 uses 'qq'"):
        GPT2BPETokenizer(vocab, merges)


def test_huggingface_adds_the_begin_of_text_of_its_file(tmp_path):
    path = huggingface_file(tmp_path, bos=True)
    tokenizer = HuggingFaceTokenizer(tmp_path)  # the folder works as the file does
    assert tokenizer.tokenize("de") == [257, 256]
    assert tokenizer.detokenize([257, 256, 258]) == "de"
    assert tokenizer.fingerprint() == HuggingFaceTokenizer(path).fingerprint()


@pytest.mark.parametrize("named", ["<s>", {"content": "<s>"}])
def test_huggingface_takes_the_end_of_document_of_its_config(tmp_path, named):
    path = huggingface_file(tmp_path)
    assert HuggingFaceTokenizer(path).eod == 258
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    assert HuggingFaceTokenizer(path).eod == 257


def test_huggingface_refuses_an_end_of_document_it_lacks(tmp_path):
    path = huggingface_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(DataError, match=r"no token <gone>"):
        HuggingFaceTokenizer(path)


def test_tiktoken_puts_special_tokens_first_in_a_json_vocabulary(tmp_path):
    as_json, _ = tiktoken_files(tmp_path)
    tokenizer = TikTokenizer(as_json)
    assert tokenizer.tokenize("de") == [1256]
    assert tokenizer.eod == 2
    assert tokenizer.vocab_size == 1257
    assert TikTokenizer(as_json, num_special_tokens=10).tokenize("de") == [266]


def test_tiktoken_cuts_a_json_vocabulary_to_the_size_asked_for(tmp_path):
    as_json, _ = tiktoken_files(tmp_path)
    tokenizer = TikTokenizer(as_json, vocab_size=1256)
    assert tokenizer.vocab_size == 1256
    assert tokenizer.tokenize("de") == [1000 + ord("d"), 1000 + ord("e")]


def test_tiktoken_keeps_the_ranks_of_a_tiktoken_file(tmp_path):
    _, as_ranks = tiktoken_files(tmp_path)
    tokenizer = TikTokenizer(as_ranks)
    assert tokenizer.tokenize("de") == [256]
    assert tokenizer.eod == 257
    with pytest.raises(DataError, match="--vocab-size 9 is not the 258"):
        TikTokenizer(as_ranks, vocab_size=9)


def test_tiktoken_names_the_line_that_is_no_rank(tmp_path):
    _, as_ranks = tiktoken_files(tmp_path)
    as_ranks.write_text(as_ranks.read_text() + "???? x\n")
    with pytest.raises(DataError, match=r"vocab.tiktoken:258 must hold"):
        TikTokenizer(as_ranks)


@pytest.mark.parametrize("pattern", ["v1", "v2", "cl100k"])
def test_tiktoken_keeps_text_whatever_the_pattern(tmp_path, pattern):
    _, as_ranks = tiktoken_files(tmp_path)
    text = "it's  12345\r\n\n\tdef \u00c9t\u00e9()/ "
    tokenizer = TikTokenizer(as_ranks, pattern=pattern)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_null_reads_numbers():
    tokenizer = NullTokenizer(100)
    assert tokenizer.tokenize("3 0 99") == [3, 0, 99]
    assert tokenizer.detokenize([3, 99, 100]) == "3 99"
    assert (tokenizer.eod, tokenizer.vocab_size) == (100, 101)


@pytest.mark.parametrize("text", ["100", "-1", "x", "1.5", "3 100 4"])
def test_null_refuses_what_is_no_id(text):
    with pytest.raises(DataError, match="numbers from 0 to 99"):
        NullTokenizer(100).tokenize(text)
