"""What the data of a run is, before it is opened for training: sources, sizes, tokenizers.

Torch-free and cheap (it maps the .idx files), so that defaults can depend on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron.core.datasets.blend import Blend, parse_blend
from megatron.core.datasets.indexed_dataset import IndexedDataset, find_prefix
from megatron.core.datasets.indexed_dataset.sidecar import Sidecar, read_sidecar
from megatron.core.datasets.mock_dataset import MOCK_NAME, mock_lengths
from megatron.core.datasets.sample_index import count_samples
from megatron.core.datasets.splits import DEFAULT_SPLIT, parse_split, split_ranges
from megatron.core.errors import ConfigError
from megatron.training.config.data import DataConfig
from megatron.training.config.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class DataPaths:
    """The sources of a run, their prefixes found on disk."""

    blends: tuple[Blend | None, Blend | None, Blend | None]
    """Of training, validation and test."""
    whole_files: bool
    """Each split has files of its own; otherwise --split divides the documents."""
    mock: bool
    """There are no files."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Each prefix once, in the order of the command line."""
        named = (prefix for blend in self.blends if blend for prefix in blend.prefixes)
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class DataFacts:
    """Sizes of the training split, and what preprocessing noted."""

    documents_of_source: Mapping[str, int]
    """Prefix -> documents of the training split."""
    tokens_of_source: Mapping[str, int]
    """Prefix -> tokens of the training split."""
    sidecars: Mapping[str, Sidecar]
    """Prefix -> sidecar, for every source of any split that has one."""

    @property
    def num_documents(self) -> int:
        """Documents of the training split."""
        return sum(self.documents_of_source.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of the training split."""
        return sum(self.tokens_of_source.values())

    @property
    def sidecar(self) -> Sidecar | None:
        """The first sidecar: the tokenizer of the run when none is named."""
        return next(iter(self.sidecars.values()), None)

    def samples_per_epoch(self, seq_length: int) -> int:
        """Return the samples that one pass over the training split gives."""
        return sum(count_samples(tokens, seq_length) for tokens in self.tokens_of_source.values())


def find_data(config: DataConfig) -> DataPaths:
    """Return the sources of --data-path, of the paths of each split, or of --mock-data.

    Raises:
        ConfigError: No data is named, data is named twice, or weights and prefixes are mixed up.
        DataError: A file is missing; says what was looked for.
    """
    ways = {
        "--data-path": config.data_path,
        "--train-data-path": config.train_data_path,
        "--valid-data-path": config.valid_data_path,
        "--test-data-path": config.test_data_path,
    }
    given = [flag for flag, values in ways.items() if values]
    if config.mock_data:
        _refuse_both(MOCK_NAME, given)
        mock = Blend((MOCK_NAME,), None)
        return DataPaths((mock, mock, mock), whole_files=False, mock=True)
    if config.data_path:
        _refuse_both("--data-path", given[1:])
        blend = _find_blend(config.data_path, "--data-path")
        return DataPaths((blend, blend, blend), whole_files=False, mock=False)
    if not config.train_data_path:
        raise ConfigError("no training data: give --data-path, --train-data-path or --mock-data")
    _refuse_both("--train-data-path", ["--split"] if config.split else [])
    train, valid, test = (
        _find_blend(values, flag) if values else None for flag, values in list(ways.items())[1:]
    )
    return DataPaths((train, valid, test), whole_files=True, mock=False)


def data_facts(config: DataConfig, _tokenizer: TokenizerConfig | None = None) -> DataFacts:
    """Return the sizes of the training split and the sidecars of all sources.

    Args:
        config: Sources and split.
        _tokenizer: Not read: sizes are in tokens as they are on disk.

    Raises:
        ConfigError: See ``find_data``; or --split is malformed.
        DataError: A file is missing or damaged.
    """
    paths = find_data(config)
    train = paths.blends[0]
    assert train is not None, "find_data refuses runs without training data"
    shares = parse_split(config.split or DEFAULT_SPLIT)
    documents, tokens = {}, {}
    for prefix in train.prefixes:
        lengths = mock_lengths() if paths.mock else IndexedDataset(prefix).sequence_lengths
        first, last = (0, len(lengths))
        if not paths.whole_files:
            first, last = split_ranges(shares, len(lengths))[0]
        documents[prefix] = last - first
        tokens[prefix] = int(lengths[first:last].sum(dtype=np.int64))
    found = {} if paths.mock else {prefix: read_sidecar(prefix) for prefix in paths.prefixes}
    sidecars = {prefix: sidecar for prefix, sidecar in found.items() if sidecar is not None}
    return DataFacts(documents, tokens, sidecars)


def _find_blend(values: list[str], flag: str) -> Blend:
    blend = parse_blend(values, flag)
    return Blend(tuple(find_prefix(prefix) for prefix in blend.prefixes), blend.weights)


def _refuse_both(chosen: str, others: list[str]) -> None:
    if others:
        raise ConfigError(f"{chosen} cannot be combined with {', '.join(others)}")
