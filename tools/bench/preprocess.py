"""tools/preprocess_data.py against the tokenizer's library alone, in megabytes a second of a core.

The text is the source of Python's standard library, the tokenizers are trained on it. The limit is
what the library does with the same texts in one call on one thread, without reading or writing.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from tools import make_stdlib_corpus, preprocess_data, train_tokenizer
from tools.bench.timing import report

MEGABYTE = 1_000_000


class Corpus(NamedTuple):
    """Documents, and the file that holds them as JSON lines."""

    path: Path
    texts: list[str]
    megabytes: float
    """Of the text in UTF-8."""


class Contender(NamedTuple):
    """A tokenizer: flags that choose it, and its library alone on all texts."""

    flags: str
    library: Callable[[Sequence[str]], object]


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor time of ``call``, of the processes that it starts and ends too."""
    begin, before = time.perf_counter(), _processor_seconds()
    call()
    return time.perf_counter() - begin, _processor_seconds() - before


def _processor_seconds() -> float:
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def make_corpus(folder: Path, megabytes: float) -> Corpus:
    """Write the first documents of the standard library, about ``megabytes`` of them."""
    whole, path = folder / "all.jsonl", folder / "corpus.jsonl"
    make_stdlib_corpus.main(["--output", str(whole)])
    texts, size = [], 0
    for line in whole.read_text(encoding="utf-8").splitlines():
        texts.append(json.loads(line)["text"])
        size += len(texts[-1].encode())
        if size >= megabytes * MEGABYTE:
            break
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(path, texts, size / MEGABYTE)


def contenders(corpus: Corpus, folder: Path, vocab_size: int) -> dict[str, Contender]:
    """Return every tokenizer that can be had here, trained on the corpus."""
    found = {
        "bytes": Contender(
            "--tokenizer-type ByteTokenizer",
            lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts],
        )
    }
    for kind in ("bpe", "unigram"):
        model = folder / f"{kind}.model"
        flags = f"--input {corpus.path} --vocab-size {vocab_size} --model-type {kind}"
        train_tokenizer.main([*flags.split(), "--output", str(model)])
        found[f"sentencepiece {kind}"] = Contender(
            f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {model}",
            _sentencepiece(model),
        )
    with contextlib.suppress(ImportError):
        path = folder / "tokenizer.json"
        library = _huggingface(path, corpus.texts, vocab_size)
        flags = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {path}"
        found["hugging face bpe"] = Contender(flags, library)
    return found


def _sentencepiece(path: Path) -> Callable[[Sequence[str]], object]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    return lambda texts: model.encode(list(texts), num_threads=1)


def _huggingface(
    path: Path, texts: Sequence[str], vocab_size: int
) -> Callable[[Sequence[str]], object]:
    """Train a byte-level BPE into ``path``."""
    import tokenizers

    model: Any = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    model.save(str(path))
    plain = tokenizers.Tokenizer.from_file(str(path))
    return lambda texts: plain.encode_batch_fast(list(texts))


def row(
    name: str, how: str, corpus: Corpus, spent: Sequence[tuple[float, float]]
) -> dict[str, object]:
    """Return a row of the table from the seconds of each round."""
    wall = statistics.median(seconds for seconds, _ in spent)
    processor = statistics.median(seconds for _, seconds in spent)
    return {
        "tokenizer": name,
        "how": how,
        "megabytes": corpus.megabytes,
        "wall_s": wall,
        "processor_s": processor,
        "mb_per_core_second": corpus.megabytes / processor,
        "mb_per_second": corpus.megabytes / wall,
    }


def measure(
    name: str, contender: Contender, corpus: Corpus, args: argparse.Namespace
) -> list[dict[str, object]]:
    """Return the rows of a tokenizer: its library, then the tool with each number of workers."""
    prefix = corpus.path.with_name("out")
    line = f"--input {corpus.path} --output-prefix {prefix} --append-eod {contender.flags}"
    alone = functools.partial(contender.library, corpus.texts)
    calls: dict[str, Callable[[], object]] = {"library alone": alone}
    for workers in args.workers:
        words = [*line.split(), "--workers", str(workers)]
        calls[f"tool, workers: {workers}"] = functools.partial(preprocess_data.main, words)
    spent: dict[str, list[tuple[float, float]]] = {how: [] for how in calls}
    for _ in range(args.rounds):
        for how, call in calls.items():
            spent[how].append(seconds(call))
    limit = statistics.median(processor for _, processor in spent["library alone"])
    return [
        row(name, how, corpus, times)
        | {"times_the_limit": statistics.median(processor for _, processor in times) / limit}
        for how, times in spent.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--output", type=Path, default=None, help="Folder for preprocess.json.")
    add("--rounds", type=int, default=3, help="Timed runs of each.")
    add("--megabytes", type=float, default=10.0, help="Text there is.")
    add("--vocab-size", type=int, default=8192, help="Tokens of the trained tokenizers.")
    add("--workers", type=int, nargs="+", default=[1, 2], help="Processes of the tool.")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core is a core
    rows: list[dict[str, object]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        corpus = make_corpus(Path(scratch), args.megabytes)
        for name, contender in contenders(corpus, Path(scratch), args.vocab_size).items():
            rows += measure(name, contender, corpus, args)
    report("preprocess", rows, args.output)


if __name__ == "__main__":
    main()
