"""Sample i of one source -> tokens, labels, loss_mask, position_ids, each [s].

Document borders come from the sample index, by position, never from a token id: an end-of-document
id inside a text, or one that is also the padding id, stays an ordinary target.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.core.datasets import index_cache
from megatron.core.datasets.indexed_dataset.sidecar import check_ids
from megatron.core.datasets.sample_index import (
    SampleIndices,
    build_sample_indices,
    count_samples,
    plan_epochs,
)
from megatron.core.datasets.splits import SplitName
from megatron.core.errors import DataError

log = logging.getLogger(__name__)


class DocumentSource(Protocol):
    """What a data set of samples needs of its documents; ``IndexedDataset`` is one."""

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """[documents]: tokens of each."""

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Return ``length`` tokens of document ``index`` from ``offset`` on, in its dtype."""


class SampleDataset(Protocol):
    """Numbered samples: what an iterator of batches reads."""

    @property
    def fingerprint(self) -> str:
        """A hash: equal when sample n is made of the same documents and offsets for every n."""

    def describe(self, num_samples: int) -> str:
        """Say where the first ``num_samples`` samples come from, for the log."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """See ``GPTDataset.__getitem__``."""


@dataclass(frozen=True, kw_only=True)
class GPTDatasetConfig:
    """What a sample depends on besides the documents."""

    sequence_length: int
    """Tokens of one sample (s)."""
    random_seed: int
    """Seed of the order of documents and samples."""
    vocab_size: int | None = None
    """An id that is not below this raises DataError; None does not check."""
    path_to_cache: str | None = None
    """Folder of the index files; None: ``cache/GPTDataset_indices`` beside the data."""
    reset_position_ids: bool = False
    """Start positions at 0 after each document border."""
    reset_attention_mask: bool = False
    """Give an attention mask that closes each document off."""
    eod_mask_loss: bool = False
    """Set the loss mask to 0 where the label is the first token of another document."""


class _Piece(NamedTuple):
    document: int
    tokens: NDArray[Any]


class GPTDataset:
    """Samples of ``sequence_length + 1`` tokens that overlap by one, from shuffled documents.

    The same arrays, and so the same samples, as Megatron-LM's for equal seed, lengths, documents
    and number of samples. Holds at least ``num_samples`` samples: whole epochs.
    """

    def __init__(
        self,
        source: DocumentSource,
        *,
        name: str,
        documents: tuple[int, int],
        num_samples: int | None,
        split: SplitName,
        config: GPTDatasetConfig,
        cache_folder: Path | None = None,
    ) -> None:
        """Plan the epochs and load or build the index.

        Args:
            source: The documents.
            name: Of the source, for messages: its prefix.
            documents: First and one past last document of the split.
            num_samples: Samples wanted; None gives one epoch.
            split: The split, for messages and file names.
            config: What a sample looks like.
            cache_folder: Where the index is kept; None keeps it in memory.

        Raises:
            DataError: The split has no tokens, or less than one sample where whole samples of
                one epoch are wanted.
        """
        self.name, self.split, self.config = name, split, config
        self._source = source
        first, last = documents
        lengths = source.sequence_lengths
        self.num_tokens = int(lengths[first:last].sum(dtype=np.int64))
        """Tokens of one epoch of the split."""
        self._check_size(last - first, num_samples)
        plan = plan_epochs(self.num_tokens, config.sequence_length, num_samples)
        self.num_epochs = plan.num_epochs
        description = {
            "class": "GPTDataset",
            "seed": config.random_seed,
            "sequence_length": config.sequence_length,
            "documents": [first, last],
            "lengths": index_cache.array_digest(lengths[first:last]),
            "num_epochs": plan.num_epochs,
            "separate_last_epoch": plan.separate_last_epoch,
        }
        self.fingerprint = index_cache.description_digest(description)

        def build() -> index_cache.Arrays:
            return build_sample_indices(
                lengths,
                documents,
                seq_length=config.sequence_length,
                plan=plan,
                seed=config.random_seed,
            )._asdict()

        self.indices = SampleIndices(
            **index_cache.load_or_build(cache_folder, f"GPTDataset-{split}", description, build)
        )
        s = config.sequence_length
        self._positions = torch.arange(s)
        self._no_mask = torch.ones(s, dtype=torch.float32)
        self._causal = None
        if config.reset_attention_mask:
            self._causal = torch.ones(s, s, dtype=torch.bool).triu(1)

    def describe(self, num_samples: int) -> str:
        """See ``SampleDataset.describe``."""
        epochs = num_samples * self.config.sequence_length / max(self.num_tokens, 1)
        return (
            f"{num_samples} samples, {epochs:.2f} epochs of the {self.num_tokens} {self.split} "
            f"tokens of {self.name}"
        )

    def __len__(self) -> int:
        """Return the number of samples, at least the number asked for."""
        return len(self.indices.shuffle_index)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return sample ``number``.

        Returns:
            ``tokens``, ``labels``, ``position_ids`` int64 [s], ``loss_mask`` float32 [s]; with
            ``reset_attention_mask`` also ``attention_mask`` bool [1, s, s], True where a token
            may NOT attend. Masks and positions may be shared between samples: do not write.

        Raises:
            DataError: An id is not of the vocabulary; names the document.
            IndexError: There is no such sample.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {self.name}, which has {len(self)}")
        pieces = list(self._pieces(number))
        text = np.concatenate([piece.tokens for piece in pieces]).astype(np.int64)  # [s + 1]
        vocab_size = self.config.vocab_size
        if vocab_size is not None and (text.max() >= vocab_size or text.min() < 0):
            for piece in pieces:
                check_ids(self.name, piece.document, piece.tokens, vocab_size)
        # places in [1, s] at which another document begins
        borders = np.cumsum([len(piece.tokens) for piece in pieces[:-1]], dtype=np.int64)
        tokens = torch.from_numpy(text)
        sample = {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": self._loss_mask(borders),
            "position_ids": self._position_ids(borders),
        }
        if self._causal is not None:
            document = torch.from_numpy(self._document_of_place(borders))
            sample["attention_mask"] = (
                self._causal | (document[:, None] != document[None, :])
            ).unsqueeze(0)
        return sample

    def _pieces(self, number: int) -> Iterator[_Piece]:
        """Yield the parts of documents that make up a sample; none is empty."""
        row = int(self.indices.shuffle_index[number])
        (first, offset), (last, last_offset) = self.indices.sample_index[row : row + 2].tolist()
        for place in range(first, last + 1):
            document = int(self.indices.document_index[place])
            length = last_offset + 1 - offset if place == last else None
            tokens = self._source.get(document, offset=offset, length=length)
            if len(tokens):
                yield _Piece(document, tokens)
            offset = 0

    def _loss_mask(self, borders: NDArray[np.int64]) -> Tensor:
        if not self.config.eod_mask_loss or not len(borders):
            return self._no_mask
        mask = self._no_mask.clone()
        mask[torch.from_numpy(borders - 1)] = 0
        return mask

    def _position_ids(self, borders: NDArray[np.int64]) -> Tensor:
        if not self.config.reset_position_ids or not len(borders):
            return self._positions
        begin = np.concatenate([[0], borders])[self._document_of_place(borders)]
        return self._positions - torch.from_numpy(begin)

    def _document_of_place(self, borders: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many borders lie at or before each place, [s]."""
        return np.searchsorted(borders, np.arange(self.config.sequence_length), side="right")

    def _check_size(self, num_documents: int, num_samples: int | None) -> None:
        s = self.config.sequence_length
        if count_samples(self.num_tokens, s):
            return
        have = (
            f"{self.name}: the {self.split} split has {self.num_tokens} tokens in "
            f"{num_documents} documents, less than one sample of --seq-length {s} + 1 tokens"
        )
        if num_samples is None or self.num_tokens == 0:
            raise DataError(
                f"{have}; give more text, a smaller --seq-length or a --split with a larger share"
            )
        log.warning("%s: its documents are repeated within a sample", have)
