"""Train a SentencePiece model that gives every text back exactly, source code included.

Nothing is normalised, no whitespace is removed, newline and tab are pieces, and any other
character is spelled in bytes if need be. The same input and flags give the same file.
"""

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import ConfigError, DataError
from megatron.core.tokenizers.base import optional_package
from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tools.preprocessing import command_line
from tools.preprocessing.records import BadRecord, records_of
from tools.preprocessing.sources import expand_inputs, read_chunks

# bytes, <unk>, <s>, </s>, newline, tab, and room for a few letters
SMALLEST_VOCAB = 300
# A longer line is trained on in parts: SentencePiece drops lines that are too long.
LONGEST_LINE = 2000
ROUND_TRIP = "def f(x):\n\tif x:\r\n        return  'a b' # caf\u00e9 \u2581 \U0001f389\n\n\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    target = Path(args.output or f"{args.model_prefix}.model")
    if target.is_dir():
        raise ConfigError(f"--output {target} is a folder; add a name, such as {target}/T.model")
    inputs = expand_inputs(args.input)
    lines = _lines(inputs, args.json_key)
    first = next(lines, None)
    if first is None:
        raise DataError(f"no text in {' '.join(args.input)}")
    model = train(_chain(first, lines), args)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(model)
    os.replace(partial, target)
    tokenizer = SentencePieceTokenizer(target)
    if tokenizer.detokenize(tokenizer.tokenize(ROUND_TRIP)) != ROUND_TRIP:
        raise AssertionError(f"{target} does not give text back exactly")
    print(f"Wrote {target}: {tokenizer.vocab_size} ids, end of document {tokenizer.eod}")


def train(lines: Iterator[str], args: argparse.Namespace) -> bytes:
    """Return a trained model.

    Args:
        lines: Text without newlines; at most ``args.input_sentence_size`` of them are kept.
        args: Parsed flags.

    Raises:
        DataError: The text is too small for the vocabulary.
    """
    package = optional_package(
        "sentencepiece",
        tokenizer="SentencePieceTokenizer",
        install="sentencepiece",
        instead="--tokenizer-type ByteTokenizer, which needs no training",
    )
    package.set_random_generator_seed(args.seed)
    model = io.BytesIO()
    try:
        _call_trainer(package, lines, model, args)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"SentencePiece cannot make --vocab-size {args.vocab_size} of this text: {reason}"
        ) from error
    return model.getvalue()


def _call_trainer(
    package: Any, lines: Iterator[str], model: io.BytesIO, args: argparse.Namespace
) -> None:
    package.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type=args.model_type,
        vocab_size=args.vocab_size,
        character_coverage=args.character_coverage,
        input_sentence_size=args.input_sentence_size,
        shuffle_input_sentence=True,
        train_extremely_large_corpus=args.input_sentence_size > 10_000_000,
        max_sentence_length=4 * LONGEST_LINE + 1,
        num_threads=args.num_threads,
        user_defined_symbols=["\n", "\t", *args.user_defined_symbols],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        split_digits=True,
        minloglevel=0 if args.verbose else 2,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Train a SentencePiece tokenizer that keeps every character.")
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="As of preprocess_data.py.")
    add("--json-key", default="text", metavar="KEY", help="Key (column) of the text.")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output", metavar="PATH", help="The model to write, such as T.model.")
    output.add_argument("--model-prefix", metavar="PATH", help="Writes PATH.model.")
    add("--vocab-size", type=int, required=True, metavar="N", help="Number of ids, all included.")
    add("--model-type", choices=["bpe", "unigram"], default="bpe",
        help="bpe trains faster, unigram tokenizes faster.")  # fmt: skip
    add("--character-coverage", type=float, default=0.9995, metavar="X",
        help="Share of characters with a piece of their own; others are bytes.")  # fmt: skip
    add("--input-sentence-size", type=command_line.positive, default=2_000_000, metavar="N",
        help="Lines kept in memory: a random sample of the input.")  # fmt: skip
    add("--user-defined-symbols", nargs="+", default=[], metavar="S",
        help="Texts that are always one piece, such as <eod>.")  # fmt: skip
    add("--num-threads", type=command_line.positive, default=2, metavar="N",
        help="Threads; unigram scores depend on it in their last digits.")  # fmt: skip
    add("--seed", type=int, default=1234, metavar="N", help="Of the random sample.")
    add("--verbose", action="store_true", help="Show SentencePiece's own log.")
    args = parser.parse_tool_args(argv)
    problems = []
    if args.vocab_size < SMALLEST_VOCAB:
        problems.append(f"--vocab-size {args.vocab_size} must be {SMALLEST_VOCAB} or more: 256 "
                        "ids are bytes")  # fmt: skip
    if not 0 < args.character_coverage <= 1:
        problems.append(f"--character-coverage {args.character_coverage} must lie in (0, 1]")
    ConfigError.raise_if_any(problems)
    return args


def _lines(inputs: Sequence[Path], key: str) -> Iterator[str]:
    """Yield the lines of all texts without their newlines, long ones in parts.

    Raises:
        DataError: A record is bad; names file and line.
    """
    for path in inputs:
        for chunk in read_chunks(path, [key], document_per_line=True):
            for record in records_of(chunk, [key]):
                if isinstance(record.texts, BadRecord):
                    if record.texts.kind == "blank line" and chunk.format == "lines":
                        continue
                    raise DataError(f"{record.where}: {record.texts}")
                for line in record.texts[0].split("\n"):
                    for start in range(0, len(line), LONGEST_LINE):
                        yield line[start : start + LONGEST_LINE]


def _chain(first: str, others: Iterator[str]) -> Iterator[str]:
    yield first
    yield from others


if __name__ == "__main__":
    command_line.run_tool(main)
