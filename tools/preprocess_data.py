"""Text to tokens: JSON lines, plain text or parquet to ``.bin``/``.idx`` files and a sidecar.

Example: python tools/preprocess_data.py --input my.jsonl --output-prefix my_data
--tokenizer-type SentencePieceTokenizer --tokenizer-model T.model --append-eod
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.datasets.indexed_dataset import sidecar as sidecars
from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset.format import DType, bin_path, idx_path
from megatron.core.errors import ConfigError, DataError
from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from tools.preprocessing import command_line
from tools.preprocessing.encode import EncodedChunk, EncodeSettings, Problem, encode_all
from tools.preprocessing.progress import Progress
from tools.preprocessing.sources import Chunk, expand_inputs, format_of, read_chunks

PROBLEMS_SHOWN = 5
REFUSED = {
    "--dataset-impl": "the format is always mmap, the one that Megatron-LM kept; leave it out",
    "--split-sentences": "sentences are for BERT; documents are written whole",
    "--keep-newlines": "it belongs to --split-sentences; newlines are always kept",
    "--lang": "it belongs to --split-sentences",
    "--find-optimal-num-workers": "the default of --workers is every core",
    "--workers-to-check": "it belongs to --find-optimal-num-workers",
    "--max-documents": "it belongs to --find-optimal-num-workers; cut the input with head -n",
}
NOTICES = {
    "partitions": "--partitions changes nothing: one stream of documents feeds all --workers",
    "keep_sequential_samples": "--keep-sequential-samples changes nothing: order is always kept",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    _check(args)
    inputs = expand_inputs(args.input)
    _check_formats(inputs, args)
    settings = EncodeSettings(
        tokenizer=command_line.tokenizer_settings_of(args),
        keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        stop_at_problem=args.on_error == "fail",
    )
    tokenizer = build_tokenizer(settings.tokenizer)
    for name, notice in NOTICES.items():
        if getattr(args, name) not in (1, False):
            print(notice, file=sys.stderr)
    prefixes = [f"{args.output_prefix}_{key}_document" for key in settings.keys]
    Path(prefixes[0]).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        builders = _open_builders(stack, prefixes, tokenizer)
        progress = Progress(sum(path.stat().st_size for path in inputs), args.log_interval)
        stack.callback(progress.close)
        chunks = _all_chunks(inputs, settings.keys, args.text_document_per_line)
        encoded = stack.enter_context(
            contextlib.closing(encode_all(chunks, settings, tokenizer, args.workers))
        )
        skipped = _write_all(encoded, builders, progress, args.on_error)
        if not builders[0].num_documents:
            raise DataError(f"no usable document in {' '.join(args.input)}: {skipped.summary()}")
        for prefix, key, builder in zip(prefixes, settings.keys, builders, strict=True):
            _finish(prefix, key, builder, tokenizer, append_eod=args.append_eod)
    _report(prefixes, builders, progress, skipped)


def _open_builders(
    stack: ExitStack, prefixes: Sequence[str], tokenizer: Tokenizer
) -> list[IndexedDatasetBuilder]:
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    return [stack.enter_context(IndexedDatasetBuilder(bin_path(p), dtype)) for p in prefixes]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Turn text into the .bin/.idx files that training reads.")
    _add_data_flags(parser)
    _add_speed_flags(parser)
    command_line.add_tokenizer_flags(parser, required=True)
    parser.refuse(REFUSED)
    return parser.parse_tool_args(argv)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    files = (
        "Files or globs of .jsonl, .json (a record per line), .txt (a document per file), each "
        "also .gz or .zst; .parquet."
    )
    keys = "Keys (columns) to encode; each becomes a dataset of its own."
    output = "Writes PATH_{key}_document.bin, .idx and .json."
    per_line = "Take each line of a .txt file as a document."
    on_error = "At a bad record: stop and name file and line, or leave it out and count it."
    add("--input", nargs="+", required=True, metavar="PATH", help=files)
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help=keys)
    add("--output-prefix", required=True, metavar="PATH", help=output)
    add("--append-eod", action="store_true", help="End each document with the end of document.")
    add("--text-document-per-line", action="store_true", help=per_line)
    add("--on-error", choices=["fail", "skip"], default="fail", help=on_error)


def _add_speed_flags(parser: argparse.ArgumentParser) -> None:
    workers = "Processes that tokenize; the output does not depend on it."
    interval = "Documents between two lines of progress, at most one a second."
    numbers = {
        "--workers": (_num_cores(), workers),
        "--partitions": (1, "Accepted from Megatron's scripts; changes nothing."),
        "--log-interval": (1000, interval),
    }
    for flag, (default, text) in numbers.items():
        parser.add_argument(
            flag, type=command_line.positive, default=default, metavar="N", help=text
        )
    parser.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="Accepted from Megatron's scripts; documents always keep their order.",
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(args: argparse.Namespace) -> None:
    problems = []
    keys = args.json_keys
    if len(set(keys)) != len(keys):
        problems.append(f"--json-keys names a key twice: {' '.join(keys)}")
    problems += [
        f"--json-keys {key!r}: a key names a file" for key in keys if "/" in key or not key
    ]
    prefix = Path(args.output_prefix)
    if args.output_prefix.endswith("/") or prefix.is_dir():
        problems.append(
            f"--output-prefix {prefix} is a folder; add a name, such as {prefix}/my_data"
        )
    ConfigError.raise_if_any(problems)


def _check_formats(inputs: Sequence[Path], args: argparse.Namespace) -> None:
    plain = [path for path in inputs if format_of(path) == "text"]
    if plain and len(args.json_keys) > 1:
        raise ConfigError(f"--json-keys {' '.join(args.json_keys)}: {plain[0]} has no keys")
    if args.text_document_per_line and not plain:
        raise ConfigError("--text-document-per-line has no effect: no --input is a .txt file")


def _all_chunks(inputs: Sequence[Path], keys: Sequence[str], per_line: bool) -> Iterator[Chunk]:
    """Read the files one after the other; positions count over all of them."""
    before = 0
    for path in inputs:
        for chunk in read_chunks(path, keys, document_per_line=per_line):
            yield dataclasses.replace(chunk, position=before + chunk.position)
        before += path.stat().st_size


class Skipped:
    """Counts bad records by kind and remembers the first few."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: list[Problem] = []

    def add(self, problem: Problem) -> None:
        """Count one."""
        self.kinds[problem.kind] += 1
        if len(self.first) < PROBLEMS_SHOWN:
            self.first.append(problem)

    def summary(self) -> str:
        """Say how many there were of each kind."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        return f"{self.kinds.total()} bad records ({counts})"

    def lines(self) -> list[str]:
        """Tell all in a few lines; none if nothing was skipped."""
        if not self.first:
            return []
        more = self.kinds.total() - len(self.first)
        shown = [f"  {problem.where}: {problem.message}" for problem in self.first]
        return [f"Skipped {self.summary()}", *shown, *([f"  and {more} more"] * bool(more))]


def _write_all(
    encoded: Iterator[EncodedChunk],
    builders: Sequence[IndexedDatasetBuilder],
    progress: Progress,
    on_error: str,
) -> Skipped:
    skipped = Skipped()
    for chunk in encoded:
        _write(chunk, builders, skipped, on_error)
        progress.update(
            documents=len(chunk.documents[0].lengths),
            num_bytes=chunk.num_bytes,
            position=chunk.position,
        )
    return skipped


def _write(
    chunk: EncodedChunk,
    builders: Sequence[IndexedDatasetBuilder],
    skipped: Skipped,
    on_error: str,
) -> None:
    if chunk.problems and on_error == "fail":
        where, _, message = chunk.problems[0]
        raise DataError(f"{where}: {message}; --on-error skip leaves such records out")
    for problem in chunk.problems:
        skipped.add(problem)
    for builder, (tokens, lengths) in zip(builders, chunk.documents, strict=True):
        builder.add_documents(tokens, lengths)


def _finish(
    prefix: str, key: str, builder: IndexedDatasetBuilder, tokenizer: Tokenizer, *, append_eod: bool
) -> None:
    sidecars.sidecar_path(prefix).unlink(missing_ok=True)  # of an older run
    builder.finalize(idx_path(prefix))
    sidecars.write_sidecar(
        prefix,
        sidecars.Sidecar(
            **sidecars.describe_tokenizer(prefix, tokenizer),
            append_eod=append_eod,
            documents=builder.num_documents,
            sequences=builder.num_sequences,
            tokens=builder.num_tokens,
            dtype=DType.optimal_dtype(tokenizer.vocab_size).__name__,
            json_key=key,
        ),
    )


def _report(
    prefixes: Sequence[str],
    builders: Sequence[IndexedDatasetBuilder],
    progress: Progress,
    skipped: Skipped,
) -> None:
    rates = f"Processed {progress.documents} documents ({progress.rates()})."
    done = f"{rates} 100% done in {progress.seconds:.1f} s"
    print("\n".join([done, *skipped.lines()]), file=sys.stderr)
    for prefix, builder in zip(prefixes, builders, strict=True):
        counts = f"{builder.num_documents} documents, {builder.num_tokens} tokens"
        print(f"Wrote {prefix}.bin, .idx, .json: {counts}")


if __name__ == "__main__":
    command_line.run_tool(main)
