"""R12: 10 steps = 5 + 5 in new processes, bit for bit; and without the random state they are not.

Two ranks with EP 2, dropout, two microbatches a step, evaluation in between, 0 and 2 loader
workers.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "--tokenizer-type": "ByteTokenizer",
    "--split": "80,20,0",
    "--seq-length": 32,
    "--num-layers": 2,
    "--hidden-size": 32,
    "--num-attention-heads": 2,
    "--position-embedding-type": "rope",
    "--num-experts": 4,
    "--moe-router-topk": 2,
    "--moe-z-loss-coeff": 1e-3,
    "--moe-router-score-function": "sigmoid",
    "--moe-router-bias-update-rate": 0.013,
    "--expert-model-parallel-size": 2,
    "--micro-batch-size": 2,
    "--global-batch-size": 8,
    "--train-iters": 10,
    "--hidden-dropout": 0.2,
    "--attention-dropout": 0.1,
    "--lr": 1e-2,
    "--min-lr": 1e-3,
    "--lr-decay-style": "cosine",
    "--lr-warmup-iters": 3,
    "--eval-interval": 2,
    "--eval-iters": 2,
    "--log-interval": 1,
    "--device": "cpu",
}
BIAS = "--moe-router-enable-expert-bias"
TIMES = ("step_ms", "tokens_per_second")


class Steps(NamedTuple):
    """What a run left behind."""

    metrics: dict[int, list[dict[str, object]]]
    """Lines of each iteration, without what depends on the clock."""
    tensors: dict[str, torch.Tensor]
    """Weights and moments after the last step."""
    common: dict[str, object]
    """The rest of the last checkpoint."""


class Rank(NamedTuple):
    """One process of a run."""

    process: subprocess.Popen[bytes]
    log: Path


def start(save: Path, *flags: object, **other: object) -> list[Rank]:
    """Begin a run: two ranks in new processes, with what torchrun would tell them.

    ``other`` replaces values of ``FLAGS``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    table = FLAGS | {f"--{name.replace('_', '-')}": value for name, value in other.items()}
    words = [sys.executable, ROOT / "pretrain_gpt.py", *chain(*table.items()), BIAS, "--save", save]
    return [_start_rank(rank, port, [*words, *flags], save) for rank in range(2)]


def _start_rank(rank: int, port: int, words: list[object], save: Path) -> Rank:
    variables = {
        "OMP_NUM_THREADS": 1,
        "PYTHONFAULTHANDLER": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": 2,
        "RANK": rank,
        "LOCAL_RANK": rank,
    }
    log = save.with_name(f"{save.name}.rank{rank}.log")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(map(str, words)),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(value) for name, value in variables.items()},
        )
    return Rank(process, log)


def wait(*runs: list[Rank]) -> None:
    """Wait for all ranks; one that hangs is stopped and its log shows where it stood."""
    ranks = list(chain(*runs))
    try:
        with suppress(subprocess.TimeoutExpired):
            for rank in ranks:
                rank.process.wait(timeout=180)
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGABRT)
    for rank in ranks:
        assert rank.process.wait() == 0, f"{rank.log}:\n{rank.log.read_text()[-4000:]}"


def result(folder: Path) -> Steps:
    """Read metrics and the checkpoint of iteration 10."""
    metrics: dict[int, list[dict[str, object]]] = {}
    for file in ("metrics.jsonl", "evaluation.jsonl", "expert_load.jsonl"):
        for line in (folder / file).read_text().splitlines():
            values = json.loads(line)
            kept = {name: value for name, value in values.items() if name not in TIMES}
            metrics.setdefault(values["iteration"], []).append(kept)
    path = folder / "iter_0000010"
    facts = stored_tensors(path)
    tensors = {
        key: torch.empty(fact.shape, dtype=fact.dtype)
        for key, fact in facts.items()
        if not key.startswith("rng.")
    }
    read_tensors(path, tensors, None, prefixes=("model.", "optimizer."))
    common = json.loads((path / "common.json").read_text())
    del common["config"]
    return Steps(metrics, tensors, common)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Steps]:
    folder = tmp_path_factory.mktemp("resume")
    data = ("--data-path", write_text(folder))
    half = folder / "half"
    wait(start(half, *data, "--exit-interval", 5, "--num-workers", 2))
    flags = {
        "unbroken": ("--num-workers", 2),
        "0 workers": ("--num-workers", 0, "--load", half),
        "2 workers": ("--num-workers", 2, "--load", half),
        "no rng": ("--num-workers", 0, "--load", half, "--no-load-rng"),
    }
    places = {name: folder / name for name in flags}
    wait(*[start(places[name], *data, *flags[name]) for name in flags])
    return {name: result(place) for name, place in places.items()}


def write_text(folder: Path) -> Path:
    """Write an indexed data set of bytes; return its prefix."""
    draw = np.random.RandomState(3)
    with IndexedDatasetBuilder(folder / "text.bin", dtype=np.uint16) as builder:
        for length in draw.randint(20, 90, size=120):
            builder.add_item(np.append(draw.randint(97, 123, size=length), 256))
            builder.end_document()
        builder.finalize(folder / "text.idx")
    return folder / "text"


@pytest.mark.parametrize("name", ["0 workers", "2 workers"])
def test_five_and_five_steps_are_ten_steps_bit_for_bit(runs: dict[str, Steps], name: str) -> None:
    unbroken, resumed = runs["unbroken"], runs[name]
    assert sorted(resumed.metrics) == [6, 7, 8, 9, 10]
    for iteration, lines in resumed.metrics.items():
        assert list(map(differing, lines, unbroken.metrics[iteration])) == [{}] * len(lines)
    assert resumed.common == unbroken.common
    assert resumed.tensors.keys() == unbroken.tensors.keys()
    for key, tensor in resumed.tensors.items():
        assert torch.equal(tensor, unbroken.tensors[key]), key


def differing(one: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    names = one.keys() | other.keys()
    return {n: (one.get(n), other.get(n)) for n in names if one.get(n) != other.get(n)}


def test_what_is_compared_is_there(runs: dict[str, Steps]) -> None:
    unbroken = runs["unbroken"]
    steps = [lines[0] for lines in unbroken.metrics.values()]
    for name in ("lm_loss", "grad_norm", "learning_rate", "consumed_samples"):
        assert len({step[name] for step in steps}) == 10, name
    evaluated = [
        iteration
        for iteration, lines in unbroken.metrics.items()
        if any(line.get("split") == "validation" for line in lines)
    ]
    assert evaluated == [2, 4, 6, 8, 10]
    biases = [value for key, value in unbroken.tensors.items() if key.endswith("expert_bias")]
    assert len(biases) == 2
    assert all(bias.any() for bias in biases)
    experts = [key for key in unbroken.tensors if ".local_experts." in key]
    assert {key.partition(".local_experts.")[2].partition(".")[0] for key in experts} == set("0123")
    assert {key.split(".")[1] for key in unbroken.tensors if key.startswith("optimizer.")} == {
        "exp_avg",
        "exp_avg_sq",
    }


def test_without_the_random_state_the_steps_differ(runs: dict[str, Steps]) -> None:
    unbroken, other = runs["unbroken"], runs["no rng"]
    assert all(
        other.metrics[iteration][0]["lm_loss"] != unbroken.metrics[iteration][0]["lm_loss"]
        for iteration in range(6, 11)
    )
    weight = "model.embedding.word_embeddings.weight"
    assert not torch.equal(other.tensors[weight], unbroken.tensors[weight])
