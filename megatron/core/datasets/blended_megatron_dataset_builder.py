"""Builds the training, validation and test data set of one or several sources.

Knows which documents and how many samples each takes; every rank builds the same, from files that
any of them may have written.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.core.datasets import index_cache
from megatron.core.datasets.blend import Blend, BlendOrder, normalised
from megatron.core.datasets.blended_dataset import BlendedDataset, load_blend_indices
from megatron.core.datasets.gpt_dataset import (
    DocumentSource,
    GPTDataset,
    GPTDatasetConfig,
    SampleDataset,
)
from megatron.core.datasets.sample_index import count_samples
from megatron.core.datasets.splits import (
    DEFAULT_SPLIT,
    SPLIT_NAMES,
    SplitName,
    parse_split,
    split_ranges,
)
from megatron.core.errors import DataError

log = logging.getLogger(__name__)

# A source is built this much larger than its share, as in Megatron-LM: it can decide whether
# another epoch begins, so changing it reorders the samples of existing runs.
MID_LEVEL_DATASET_SURPLUS = 0.005


@dataclass(frozen=True, kw_only=True)
class DataSources:
    """Where the documents come from."""

    blends: tuple[Blend | None, Blend | None, Blend | None]
    """Of training, validation and test; the same three times when ``split`` divides them."""
    split: str | None = None
    """Shares of the documents; None is the default. Not used with ``whole_files``."""
    whole_files: bool = False
    """Each split has files of its own and takes all of their documents."""
    open_source: Callable[[str], DocumentSource]
    """prefix -> documents."""
    in_memory: bool = False
    """Do not look for a cache beside the prefix (there is no file)."""


class BlendedMegatronDatasetBuilder:
    """Builds data sets for one ``GPTDatasetConfig`` and its sources."""

    def __init__(
        self,
        config: GPTDatasetConfig,
        sources: DataSources,
        *,
        sizes: tuple[int | None, int | None, int | None],
        order: BlendOrder = "even",
    ) -> None:
        """Take what to build.

        Args:
            config: What a sample looks like.
            sources: Where the documents come from.
            sizes: Samples of training, validation and test; 0 builds none, None one epoch.
            order: See ``blend_indices``.
        """
        self._config, self._sources, self._sizes, self._order = config, sources, sizes, order
        self._shares = parse_split(sources.split or DEFAULT_SPLIT)
        self._opened: dict[str, DocumentSource] = {}

    def build(self) -> tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]:
        """Return the three data sets; None where there is nothing to read.

        A split is None when no samples are asked for, its share is 0 or it has no files. With
        the default ``--split``, validation and test are also None, with a note, when the data is
        too small to give them documents.

        Raises:
            DataError: Too little data, with the numbers and what to change.
        """
        train, valid, test = (self._build_split(place) for place in range(len(SPLIT_NAMES)))
        return train, valid, test

    def _build_split(self, place: int) -> SampleDataset | None:
        split, size, blend = SPLIT_NAMES[place], self._sizes[place], self._sources.blends[place]
        share_is_zero = not self._sources.whole_files and self._shares[place] == 0
        if size == 0 or blend is None or share_is_zero:
            return None
        blend = self._without_empty(blend, place)
        if blend is None:
            return None
        if split == "train":
            self._check_training_size(blend, place)
        if len(blend.prefixes) == 1:
            return self._source(blend.prefixes[0], place, size)
        return self._blend(blend, split, place, size)

    def _blend(self, blend: Blend, split: SplitName, place: int, size: int | None) -> SampleDataset:
        epochs = [self._samples_of_epoch(prefix, place) for prefix in blend.prefixes]
        # a source of less than one sample still takes part, repeated within a sample
        weights = blend.weights or normalised([max(1.0, float(epoch)) for epoch in epochs])
        one_epoch = blend.weights is None and (size is None or size <= sum(epochs))
        if size is None:
            size = int(min(max(1, e) / w for e, w in zip(epochs, weights, strict=True)))
        indices = load_blend_indices(
            weights,
            size,
            order=self._order,
            split=split,
            cache_folder=self._cache_folder(blend.prefixes[0]),
        )
        counts = np.bincount(indices.source_index, minlength=len(weights)).tolist()
        datasets: list[SampleDataset] = []
        for prefix, weight, count, epoch in zip(
            blend.prefixes, weights, counts, epochs, strict=True
        ):
            share = math.ceil(math.ceil(size * weight) * (1 + MID_LEVEL_DATASET_SURPLUS))
            assert count <= share, f"{prefix=} {count=} {share=}"
            within_epoch = one_epoch and 0 < count <= epoch
            datasets.append(self._source(prefix, place, None if within_epoch else share))
        return BlendedDataset(datasets, indices, weights=weights, order=self._order)

    def _source(self, prefix: str, place: int, num_samples: int | None) -> GPTDataset:
        return GPTDataset(
            self._open(prefix),
            name=prefix,
            documents=self._documents(prefix, place),
            num_samples=num_samples,
            split=SPLIT_NAMES[place],
            config=self._config,
            cache_folder=self._cache_folder(prefix),
        )

    def _without_empty(self, blend: Blend, place: int) -> Blend | None:
        """Leave out sources that have no tokens for this split; None when none is left."""
        split = SPLIT_NAMES[place]
        tokens = [self._num_tokens(prefix, place) for prefix in blend.prefixes]
        if all(tokens):
            return blend
        empty = [p for p, count in zip(blend.prefixes, tokens, strict=True) if not count]
        found = f"no {split} documents in {', '.join(empty)}: {self._account(empty[0])}"
        default = self._sources.split is None and not self._sources.whole_files
        if split == "train" or (not any(tokens) and not default):
            raise DataError(
                f"{found}; give more text or a --split such as 80,10,10"
                + ("" if split == "train" else ", or ask for no evaluation with --eval-iters 0")
            )
        # nobody chose the default: a note from rank 0 is enough
        level = logging.INFO if default else logging.WARNING
        log.log(level, "%s; it is left out of the %s data", found, split)
        kept = [i for i, count in enumerate(tokens) if count]
        if not kept:
            return None
        weights = blend.weights and normalised([blend.weights[i] for i in kept])
        return Blend(tuple(blend.prefixes[i] for i in kept), weights)

    def _account(self, prefix: str) -> str:
        if self._sources.whole_files:
            return "the file holds no tokens"
        total = len(self._open(prefix).sequence_lengths)
        parts = [end - begin for begin, end in split_ranges(self._shares, total)]
        split = self._sources.split or f"{DEFAULT_SPLIT} (the default)"
        return f"--split {split} of {total} documents gives {parts[0]}, {parts[1]}, {parts[2]}"

    def _samples_of_epoch(self, prefix: str, place: int) -> int:
        return count_samples(self._num_tokens(prefix, place), self._config.sequence_length)

    def _check_training_size(self, blend: Blend, place: int) -> None:
        if any(self._samples_of_epoch(prefix, place) for prefix in blend.prefixes):
            return
        tokens = [self._num_tokens(prefix, place) for prefix in blend.prefixes]
        raise DataError(
            f"{', '.join(blend.prefixes)}: {max(tokens)} training tokens are less than one sample "
            f"of --seq-length {self._config.sequence_length} + 1 tokens; give more text, a smaller "
            "--seq-length or a --split with a larger share"
        )

    def _num_tokens(self, prefix: str, place: int) -> int:
        begin, end = self._documents(prefix, place)
        return int(self._open(prefix).sequence_lengths[begin:end].sum(dtype=np.int64))

    def _documents(self, prefix: str, place: int) -> tuple[int, int]:
        total = len(self._open(prefix).sequence_lengths)
        return (0, total) if self._sources.whole_files else split_ranges(self._shares, total)[place]

    def _open(self, prefix: str) -> DocumentSource:
        if prefix not in self._opened:
            self._opened[prefix] = self._sources.open_source(prefix)
        return self._opened[prefix]

    def _cache_folder(self, prefix: str) -> Path | None:
        if self._sources.in_memory and self._config.path_to_cache is None:
            return None
        return index_cache.cache_folder(self._config.path_to_cache, prefix)
