"""SentencePiece: whitespace survives, long texts are cut only where it changes nothing."""

import pytest
import sentencepiece

from megatron.core.errors import DataError
from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.helpers.tiny_tokenizers import SOURCE, sentencepiece_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_long_text_has_the_ids_of_the_package(folder, model_type):
    path = sentencepiece_model(folder / f"{model_type}.model", model_type=model_type)
    text = (SOURCE + "x" * 500 + "\n\n" + "  \t") * 5
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert SentencePieceTokenizer(path).tokenize(text) == plain.encode(text)


def test_only_bpe_models_that_keep_whitespace_are_cut(folder):
    def cuts(name, **options):
        tokenizer = SentencePieceTokenizer(sentencepiece_model(folder / name, **options))
        return tokenizer._cuts_at_newlines

    assert cuts("a.model")
    assert not cuts("b.model", model_type="unigram")
    assert not cuts("c.model", add_dummy_prefix=True)
    assert not cuts("d.model", user_defined_symbols=["\n", "\n\n"])


def test_a_piece_named_eod_ends_documents(folder):
    with_piece = sentencepiece_model(folder / "e.model", control_symbols=["<eod>"])
    tokenizer = SentencePieceTokenizer(with_piece)
    model = sentencepiece.SentencePieceProcessor(model_file=str(with_piece))
    assert tokenizer.eod == model.piece_to_id("<eod>")
    assert tokenizer.eod not in tokenizer.tokenize("a <eod> b")


def test_without_it_the_end_of_sentence_does(folder):
    assert SentencePieceTokenizer(sentencepiece_model(folder / "f.model")).eod == 2


def test_a_model_with_neither_is_refused(folder):
    path = sentencepiece_model(folder / "g.model", eos_id=-1)
    with pytest.raises(DataError, match=r"neither a piece <eod> nor"):
        SentencePieceTokenizer(path)


def test_a_model_of_the_packages_defaults_works_as_it_does(folder):
    tokenizer = SentencePieceTokenizer(sentencepiece_model(folder / "h.model", exact=False))
    assert tokenizer.detokenize(tokenizer.tokenize("return  radius")) == "return radius"
