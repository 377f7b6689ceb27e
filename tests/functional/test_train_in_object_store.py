"""Runs that save to and resume from the URL of an object store, as ``pretrain_gpt.py`` does it."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

import pretrain_gpt
from megatron.core.dist_checkpointing import folders
from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors
from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from tests.functional import test_generate
from tests.helpers.object_store import BUCKET, ObjectStore, make_store, objects
from tests.helpers.tiny_tokenizers import sentencepiece_model

generate = test_generate.generate
TINY = (
    "--mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 4 "
    "--moe-router-topk 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 "
    "--lr-decay-style constant --log-interval 1 --eval-iters 0 --device cpu --num-workers 0 "
    "--hidden-dropout 0.1 --train-iters 4"
)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return make_store(tmp_path)


def train(flags: str, *, ranks: int = 1, fails: str = "") -> tuple[int, str]:
    """Train in forked processes; returns exit code and log of the first rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            _rank(rank, ranks, port, flags, fails)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[0], Path("rank0.log").read_text()


def _rank(rank: int, ranks: int, port: int, flags: str, fails: str) -> None:
    """Be one rank of a run; uploads of objects whose name holds ``fails`` are refused."""
    code: object = 1
    try:
        log = os.open(f"rank{rank}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        sys.stdout = sys.stderr = os.fdopen(log, "w")
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            os.environ |= {name: str(value) for name, value in names.items()}
        if fails:
            ObjectStore.fails = staticmethod(lambda path: fails in path)
        sys.modules["matplotlib"] = None  # type: ignore[assignment]  # no plot: seconds
        torch.set_num_threads(1)
        sys.argv = ["pretrain_gpt.py", *TINY.split(), *flags.split()]
        pretrain_gpt.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def state(url: str) -> dict[str, torch.Tensor]:
    """Return every tensor of the latest checkpoint."""
    found = folders.find_checkpoint(place(url), folders.latest_iteration(place(url)))
    assert found is not None
    tensors = {k: torch.empty(f.shape, dtype=f.dtype) for k, f in stored_tensors(found).items()}
    read_tensors(found, tensors, None, prefixes=("",))
    return tensors


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["lm_loss"] for line in lines]


def test_two_ranks_resume_from_a_store_bit_for_bit(url: str, tmp_path: Path) -> None:
    both = "--expert-model-parallel-size 2"
    whole, half = f"{url}/whole", f"{url}/half"
    code, log = train(f"{both} --save {whole} --save-interval 2 --keep-last 1", ranks=2)
    assert code == 0, log
    assert folders.complete_iterations(place(whole)) == [4]
    again = f"{both} --save {half} --load {half} --async-save"
    code, log = train(f"{again} --allow-fresh-start --exit-interval 2", ranks=2)
    assert code == 0, log
    code, log = train(again, ranks=2)
    assert code == 0, log
    assert f"resuming at iteration 2 from {half}/iter_0000002" in log
    kept = "runs/" + half.partition("://")[2].strip("/")
    assert f"using --log-dir {kept} (--save is an object store, and metrics need a folder)" in log
    assert losses(tmp_path / kept) == losses(tmp_path / kept.replace("half", "whole"))
    found, expected = state(half), state(whole)
    assert found.keys() == expected.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in found)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    code, log = train(f"--load {whole} --ckpt-step 2")
    assert code == 2
    assert f"{whole} has no complete checkpoint of iteration 2; complete here: 4" in log


def test_a_store_that_refuses_one_save_does_not_end_training(url: str) -> None:
    code, log = train(f"--save {url} --save-interval 2", fails="iter_0000002/tensors")
    assert code == 0, log
    told = "checkpoint of iteration 2 was NOT saved: no more room in this bucket"
    assert log.count(told) == 1
    assert f"saved checkpoint of iteration 4 to {url}/iter_0000004" in log
    assert folders.complete_iterations(place(url)) == [4]
    assert not any("iter_0000002" in name for name in objects(url))


@pytest.mark.parametrize("what", ["bucket", "permission"])
def test_a_store_that_cannot_be_written_ends_the_run_before_training(url: str, what: str) -> None:
    save = url.replace(BUCKET, "_other_") if what == "bucket" else url
    code, log = train(f"--save {save}", fails=".probe")
    assert code == 2
    why = "specified bucket does not exist" if what == "bucket" else "no more room in this bucket"
    assert f"--save {save} cannot be written: " in log
    assert why in log
    assert log.count(why) == 1
    assert "Traceback" not in log
    assert "iteration        1" not in log


def test_text_is_generated_from_a_store_and_its_copy_of_the_tokenizer(
    url: str, tmp_path: Path, generate
) -> None:
    vocabulary = sentencepiece_model(tmp_path / "words")
    flags = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(vocabulary)}
    test_generate.save(url, tokenizer=flags)
    vocabulary.unlink()
    words = ("--load", url, "--prompt", "def area", "--greedy", "--max-new-tokens", 4)
    code, text, errors = generate(*words)
    assert (code, errors) == (0, "")
    assert text.startswith("def area")
    assert generate("--load", f"{url}/iter_0000003", *words[2:]) == (code, text, errors)
    code, _, errors = generate("--load", f"{url}/none", *words[2:])
    assert (code, f"--load {url}/none is not a folder" in errors) == (2, True)


def test_options_know_what_lies_in_a_store(url: str) -> None:
    test_generate.save(url)

    def problems(flags: str) -> str:
        with pytest.raises(ConfigError) as caught:
            parse_args([*TINY.split(), *flags.split()], world_size=1)
        assert len(caught.value.problems) == 1
        return caught.value.problems[0]

    assert f"--save {url} already holds checkpoints of another run" in problems(f"--save {url}")
    assert f"--load {url}/none is no folder (looked for {url}/none/latest_" in problems(
        f"--load {url}/none"
    )
    config = parse_args([*TINY.split(), "--save", f"{url}/", "--load", url], world_size=1)
    assert config.checkpoint.save == f"{url}/"
    assert config.logging.log_dir.startswith("runs/")
    given = parse_args([*TINY.split(), "--save", url, "--load", url, "--log-dir", "x"])
    assert given.logging.log_dir == "x"
