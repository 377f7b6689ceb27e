"""Chunks to ids, in order, on as many cores as asked for; at most a few chunks wait in memory.

The result does not depend on the number of workers: each chunk is encoded alone, and results are
taken in the order of the chunks.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron.core.datasets.indexed_dataset.format import DType
from megatron.core.errors import DataError
from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.build_tokenizer import TokenizerSettings, build_tokenizer
from tools.preprocessing.records import BadRecord, Record, records_of
from tools.preprocessing.sources import Chunk

CHUNKS_PER_WORKER = 3


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What decides the ids, besides the text."""

    tokenizer: TokenizerSettings
    keys: tuple[str, ...]
    append_eod: bool
    stop_at_problem: bool


class Problem(NamedTuple):
    """A bad record."""

    where: str
    kind: str
    message: str


class EncodedKey(NamedTuple):
    """The documents of one key, back to back."""

    tokens: np.ndarray  # [sum of lengths]
    lengths: np.ndarray  # int32 [documents]


class EncodedChunk(NamedTuple):
    """What became of a chunk."""

    documents: list[EncodedKey]  # one per key
    problems: list[Problem]  # in order; encoding may have stopped at the first
    num_bytes: int
    position: int


class Encoder:
    """Encodes chunks in this process."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._dtype = np.dtype(DType.optimal_dtype(tokenizer.vocab_size))
        self._end = np.array([tokenizer.eod] * settings.append_eod, dtype=self._dtype)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encode every good record; a record bad in one key is left out of all of them."""
        good: list[list[np.ndarray]] = []
        problems: list[Problem] = []
        for record in records_of(chunk, self._settings.keys):
            try:
                good.append(self._encode_record(record))
            except BadRecord as problem:
                problems.append(Problem(record.where, problem.kind, str(problem)))
                if self._settings.stop_at_problem:
                    break
        columns = zip(*good, strict=True) if good else [[] for _ in self._settings.keys]
        documents = [self._joined(list(column)) for column in columns]
        return EncodedChunk(documents, problems, chunk.num_bytes, chunk.position)

    def _encode_record(self, record: Record) -> list[np.ndarray]:
        if isinstance(record.texts, BadRecord):
            raise record.texts
        ids = []
        for text in record.texts:
            try:
                found = self._tokenizer.tokenize_array(text)
            except DataError as error:
                raise BadRecord("text the tokenizer refuses", str(error)) from error
            if (found == self._tokenizer.eod).all():
                raise BadRecord("no tokens besides the end of document")
            ids.append(found.astype(self._dtype))
        return ids

    def _joined(self, documents: list[np.ndarray]) -> EncodedKey:
        parts = [part for document in documents for part in (document, self._end)]
        tokens = np.concatenate(parts) if parts else np.empty(0, self._dtype)
        lengths = [len(document) + len(self._end) for document in documents]
        return EncodedKey(tokens, np.array(lengths, dtype=np.int32))


def encode_all(
    chunks: Iterable[Chunk], settings: EncodeSettings, tokenizer: Tokenizer, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Yield the encoded chunks in the order of ``chunks``.

    Args:
        chunks: Read only a few ahead of what is taken.
        settings: For this process and the workers.
        tokenizer: Built from ``settings``; used here if there is one worker, which is then this
            process.
        workers: Processes.

    Raises:
        DataError: A worker died.
    """
    if workers == 1:
        yield from map(Encoder(settings, tokenizer).encode, chunks)
        return
    method = "fork" if sys.platform == "linux" else None
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=(settings, os.getpid()),
    )
    waiting: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} workers was killed, as happens when memory runs out; "
            "try fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None


def _start_worker(settings: EncodeSettings, parent: int) -> None:
    global _encoder  # the pool offers no other place for a worker's state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core per worker, not all cores in each
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _encoder = Encoder(settings, build_tokenizer(settings.tokenizer))


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    assert _encoder, "the pool ran _start_worker"
    return _encoder.encode(chunk)


def _leave_with(parent: int) -> None:
    """End this worker when the parent is gone: a killed parent cannot tell it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
