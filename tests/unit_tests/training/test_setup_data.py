import os
import random
import signal
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.core.datasets.gpt_dataset import SampleDataset
from megatron.core.errors import DataError
from megatron.training.checkpoint_state import LoadedState
from megatron.training.config.data import DataConfig
from megatron.training.setup_data import (
    Batch,
    build_data_iterator,
    build_train_valid_test_datasets,
)
from megatron.training.training import loader_workers, tell_changed_data
from tests.helpers.documents import counting_documents, write_documents


def build(config: DataConfig, num_samples=(40, 8, 0), vocab_size: int = 5000):
    return build_train_valid_test_datasets(
        config, seed=3, num_samples=num_samples, eod_id=0, vocab_size=vocab_size
    )


@pytest.fixture
def dataset(tmp_path: Path) -> SampleDataset:
    prefix = write_documents(tmp_path / "a", counting_documents([17, 40, 33] * 6))
    config = DataConfig(data_path=[prefix], split="90,10", seq_length=8, reset_attention_mask=True)
    train, valid, test = build(config)
    assert train is not None
    assert valid is not None
    assert test is None
    return train


def iterate(
    dataset: SampleDataset, workers: int = 0, consumed: int = 0, rank: int = 0, dp: int = 2
):
    return build_data_iterator(
        dataset,
        consumed_samples=consumed,
        micro_batch_size=2,
        global_batch_size=4 * dp,
        num_microbatches=2,
        dp_rank=rank,
        dp_size=dp,
        num_workers=workers,
    )


def assert_equal(first: Batch, second: Batch) -> None:
    assert first.sample_ids == second.sample_ids
    for name in ("tokens", "labels", "loss_mask", "position_ids", "attention_mask"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_a_batch_holds_the_samples_it_names(dataset: SampleDataset) -> None:
    batch = next(iterate(dataset, consumed=8, rank=1))
    assert batch.sample_ids == (10, 11)
    assert batch.tokens.shape == (2, 8)
    assert torch.equal(batch.tokens[1], dataset[11]["tokens"])
    assert torch.equal(batch.labels[1], dataset[11]["labels"])
    assert batch.attention_mask is not None
    assert batch.attention_mask.shape == (2, 1, 8, 8)


def test_workers_give_the_same_batches(dataset: SampleDataset) -> None:
    alone, helped = iterate(dataset), iterate(dataset, workers=2)
    for first, second in islice(zip(alone, helped, strict=False), 6):
        assert_equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_iterator_goes_on_where_it_stopped(dataset: SampleDataset, workers: int) -> None:
    whole = list(islice(iterate(dataset, workers), 8))
    resumed = iterate(dataset, workers, consumed=16)
    for first, second in zip(whole[4:], islice(resumed, 4), strict=True):
        assert_equal(first, second)


def test_the_global_order_does_not_depend_on_the_ranks(dataset: SampleDataset) -> None:
    rows: dict[int, dict[int, list[int]]] = {}
    for dp in (1, 2, 4):
        rows[dp] = {}
        for rank in range(dp):
            for batch in islice(iterate(dataset, rank=rank, dp=dp), 8 // dp):
                rows[dp].update(zip(batch.sample_ids, batch.tokens.tolist(), strict=True))
    assert rows[1] == rows[2] == rows[4]
    assert sorted(rows[1]) == list(range(16))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_generator_moves(dataset: SampleDataset, workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    next(iterate(dataset, workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_read_before_the_end_is_an_error(
    dataset: SampleDataset, workers: int
) -> None:
    batches = iterate(dataset, workers, consumed=len(dataset) // 4 * 4 - 8)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataError, match=rf"{len(dataset)} samples .*--train-iters"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_foreign_id_is_one_clear_line_also_from_a_worker(tmp_path: Path, workers: int) -> None:
    documents = counting_documents([30] * 9)
    documents[4][3] = 4999
    prefix = write_documents(tmp_path / "a", documents)
    train, _, _ = build(DataConfig(data_path=[prefix], split="1", seq_length=8), vocab_size=4999)
    assert train is not None
    batches = iterate(train, workers)
    with pytest.raises(DataError, match=r"^[^\n]*document 4 [^\n]*4999[^\n]*$"):
        list(batches)


def test_workers_outlive_a_signal_and_not_the_iterator(dataset: SampleDataset) -> None:
    before = children()
    batches = iterate(dataset, workers=2)
    workers = children() - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    first = next(batches)
    rest = [next(batches) for _ in range(5)]
    assert (first.sample_ids, rest[-1].sample_ids) == ((0, 1), (20, 21))
    del batches
    end = time.monotonic() + 5
    while children() & workers and time.monotonic() < end:
        time.sleep(0.01)
    assert not children() & workers


def children() -> set[int]:
    """Process ids of the living children of this process."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(encoding="ascii")
    return {int(word) for word in found.split()}


def test_mock_data_needs_no_file() -> None:
    config = DataConfig(mock_data=True, seq_length=512)
    train, valid, _ = build(config, vocab_size=100)
    assert train is not None
    assert valid is not None
    batch = next(iterate(train))
    assert (batch.tokens.shape, int(batch.tokens.max()) < 100) == ((2, 512), True)


def test_a_blend_from_the_command_line_is_mixed(tmp_path: Path) -> None:
    first = write_documents(tmp_path / "a", [[1] * 40] * 4)
    second = write_documents(tmp_path / "b", [[2] * 40] * 4)
    config = DataConfig(data_path=["3", first, "1", second], split="1", seq_length=8)
    train, _, _ = build(config, num_samples=(400, 0, 0))
    assert train is not None
    firsts = [int(train[number]["tokens"][0]) for number in range(400)]
    assert (firsts.count(1), firsts.count(2)) == (300, 100)


def test_a_resumed_run_is_told_when_the_order_of_its_data_changed(caplog):
    datasets = (SimpleNamespace(fingerprint="now"), None, None)
    state = LoadedState(iteration=1, consumed_train_samples=8, dropout_seed=0)
    for then in (None, "now"):
        tell_changed_data(replace(state, data_fingerprint=then), datasets)
    assert caplog.text == ""
    tell_changed_data(replace(state, data_fingerprint="then"), datasets)
    assert "sample 8 of the new order" in caplog.text


@pytest.mark.parametrize(
    ("device", "given", "workers"), [("cpu", False, 0), ("cpu", True, 2), ("cuda", False, 2)]
)
def test_readers_are_forked_on_cpu_only_when_asked_for(device, given, workers):
    config = SimpleNamespace(data=DataConfig(), given=lambda name: given)
    run = SimpleNamespace(config=config, world=SimpleNamespace(device=torch.device(device)))
    assert loader_workers(run) == workers
