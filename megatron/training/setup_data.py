"""Config -> data sets -> iterators of this rank's microbatches.

Order is a function of (seed, consumed samples). The DataLoader draws from a generator of its own
and workers change nothing but speed.
"""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader

from megatron.core.datasets.blended_megatron_dataset_builder import (
    BlendedMegatronDatasetBuilder,
    DataSources,
)
from megatron.core.datasets.gpt_dataset import DocumentSource, GPTDatasetConfig, SampleDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.mock_dataset import MockDocuments
from megatron.core.errors import DataError
from megatron.training.config.data import DataConfig
from megatron.training.datasets.batch import Batch
from megatron.training.datasets.data_facts import find_data
from megatron.training.datasets.data_samplers import SamplePlan
from megatron.training.machine.core_binding import unbind

__all__ = ["Batch", "build_data_iterator", "build_train_valid_test_datasets"]

_Numbers = tuple[int, ...]
_LEFT_TO_THE_TRAINER = (signal.SIGTERM, signal.SIGINT)


def build_train_valid_test_datasets(
    config: DataConfig,
    *,
    seed: int,
    num_samples: tuple[int | None, int | None, int | None],
    eod_id: int | None,
    vocab_size: int,
) -> tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]:
    """Build the data sets of training, validation and test; every rank calls this alone.

    Args:
        config: Sources, split, sequence length, masks.
        seed: Of the order of documents and samples.
        num_samples: Samples of each; 0 builds none, None one epoch. At least so many are there.
        eod_id: Ends the documents of --mock-data; documents on disk have their own.
        vocab_size: Ids of the tokenizer, not padded; larger ids in the data raise when read.

    Raises:
        ConfigError: See ``find_data``.
        DataError: Missing, damaged or too little data.
    """
    paths = find_data(config)
    open_source: Callable[[str], DocumentSource] = IndexedDataset
    if paths.mock:
        open_source = partial(_open_mock, vocab_size=vocab_size, eod_id=eod_id)
    sources = DataSources(
        blends=paths.blends,
        split=config.split,
        whole_files=paths.whole_files,
        open_source=open_source,
        in_memory=paths.mock,
    )
    sample = GPTDatasetConfig(
        sequence_length=config.seq_length,
        random_seed=seed,
        vocab_size=vocab_size,
        path_to_cache=config.data_cache_path,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
        eod_mask_loss=config.eod_mask_loss,
    )
    return BlendedMegatronDatasetBuilder(
        sample, sources, sizes=num_samples, order=config.blend_order
    ).build()


def build_data_iterator(
    dataset: SampleDataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    num_microbatches: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Return this rank's microbatches after ``consumed_samples``, on the CPU.

    Microbatch m of data-parallel rank r covers the samples consumed + m*mbs*dp + r*mbs + [0, mbs).
    Batches are the same for every ``num_workers``; 0 is right for a short evaluation, since workers
    take time to start. Pinned memory is used when CUDA is in use.

    Raises:
        DataError: On ``next``: the data set is exhausted, or an id is not of the vocabulary.
    """
    assert micro_batch_size * dp_size * num_microbatches == global_batch_size, (
        f"{micro_batch_size=} {dp_size=} {num_microbatches=} {global_batch_size=}"
    )
    plan = SamplePlan(
        micro_batch_size=micro_batch_size, data_parallel_rank=dp_rank, data_parallel_size=dp_size
    )
    loader: DataLoader[Batch | DataError] = DataLoader(
        _Microbatches(dataset),  # type: ignore[arg-type]
        batch_size=None,
        sampler=plan.microbatches(consumed_samples, len(dataset)),  # type: ignore[arg-type]
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_initialized(),
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_TRAINER)  # workers inherit it
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _BatchIterator(batches, len(dataset))


class _Microbatches:
    """Reads a microbatch; an error of the data travels as a value, not as a worker's traceback."""

    def __init__(self, dataset: SampleDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, numbers: _Numbers) -> Batch | DataError:
        try:
            return Batch.of_samples([self._dataset[number] for number in numbers], numbers)
        except DataError as error:
            return error


class _BatchIterator:
    """Hands out the batches of a loader and raises the data's errors where they are read."""

    def __init__(self, batches: Iterator[Batch | DataError], total_samples: int) -> None:
        self._batches: Iterator[Batch | DataError] | None = batches
        self._total_samples = total_samples
        # Workers ignore SIGTERM, by which multiprocessing ends them at exit: end them before.
        atexit.register(_close, weakref.ref(self))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        assert self._batches is not None, "the iterator is closed"
        batch = next(self._batches, None)
        if batch is None:
            raise DataError(
                f"the data set has {self._total_samples} samples and all have been read; it must "
                "hold --train-iters x --global-batch-size samples"
            )
        if isinstance(batch, DataError):
            raise batch
        return batch

    def close(self) -> None:
        """End the workers; the loader does so when nothing refers to it any more."""
        self._batches = None


def _close(iterator: "weakref.ref[_BatchIterator]") -> None:
    alive = iterator()
    if alive is not None:
        alive.close()


def _open_mock(_name: str, *, vocab_size: int, eod_id: int | None) -> DocumentSource:
    return MockDocuments(vocab_size=vocab_size, eod_id=eod_id)


def _start_worker(_worker: int) -> None:
    unbind()  # beside the trainer, not on its cores
    _leave_signals_to_the_trainer()


def _leave_signals_to_the_trainer() -> None:
    """A signal to the process group stops the trainer at a step it chooses; it reads until then."""
    for number in _LEFT_TO_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_THE_TRAINER)
