"""What users get wrong is answered at once: what, the values, what to do; all of it together."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset.format import bin_path, idx_path
from megatron.core.datasets.indexed_dataset.sidecar import (
    Sidecar,
    describe_tokenizer,
    write_sidecar,
)
from megatron.core.errors import ConfigError
from megatron.core.tokenizers.byte_tokenizer import ByteTokenizer
from megatron.training.arguments import core_transformer_config_from_args, parse_args
from tests.functional.bad_input import BAD, GOOD, MOE, SHAPE
from tests.helpers.processes import child_seconds

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_its_values_and_a_way_out(name):
    world_size, line, wanted = BAD[name]
    with pytest.raises(ConfigError) as error:
        parse_args(line.split(), world_size=world_size)
    for text in wanted:
        assert text in str(error.value)
    assert len(error.value.problems) <= max(2, len(wanted)), (
        "one mistake makes no cascade of messages"
    )


def test_all_problems_are_listed_at_once():
    line = (
        f"{MOE} --mtp-detach-heads --moe-router-topk 9 --lr -1 --save-interval 3 "
        "--expert-model-parallel-size 3"
    )
    with pytest.raises(ConfigError) as error:
        parse_args(line.split(), world_size=1)
    assert str(error.value).count("\n  - ") == 5


def test_a_misspelt_flag_is_not_also_missing():
    line = "--num-layerz 2 --hidden-size x --mock-data --num-expertz 8 --moe-router-topk 2"
    with pytest.raises(ConfigError) as error:
        parse_args(line.split(), world_size=1)
    problems = str(error.value).splitlines()[1:]
    assert len(problems) == 3
    assert all("unknown" in p or "must be a whole number" in p for p in problems)


def test_what_follows_from_a_misread_length_is_not_told():
    line = f"{GOOD} --train-iters x --lr-warmup-iters 200"
    with pytest.raises(ConfigError) as error:
        parse_args(line.split(), world_size=1)
    assert len(str(error.value).splitlines()) == 2


def test_good_lines_pass():
    parse_args(MOE.split(), world_size=8)
    config = parse_args(
        f"{MOE} --moe-router-topk 1 --moe-router-pre-softmax --expert-model-parallel-size 2 "
        "--use-mcore-models --moe-grouped-gemm --local-rank 0 "
        "--position-embedding-type rope --no-position-embedding "
        "--moe-layer-freq ([0]*2+[1]*2)".split(),
        world_size=2,
    )
    assert core_transformer_config_from_args(config).moe_layer_pattern == (False, False, True, True)
    assert sum("has no effect" in notice for notice in config.notices) == 4


def test_a_fresh_run_does_not_save_among_the_checkpoints_of_another(tmp_path):
    line = f"{GOOD} --save {tmp_path}"
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "iter_0000010" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"newest: iteration 10\); add --load {tmp_path}"):
        parse_args(line.split(), world_size=1)
    assert parse_args(f"{line} --load {tmp_path}".split(), world_size=1)


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="lies below the file"):
        parse_args(f"{GOOD} --save {tmp_path}/file/ck".split(), world_size=1)


def test_checks_that_compare_ranks_are_a_notice_on_one():
    line = f"{GOOD} --check-replica-hash 10 --check-collectives"
    config = parse_args(line.split(), world_size=1)
    assert config.distributed.check_replica_hash is None
    assert not config.distributed.check_collectives
    assert "--check-replica-hash 10: nothing to compare on one rank" in config.notices
    assert "--check-collectives: nothing to compare on one rank" in config.notices
    config = parse_args(line.split(), world_size=2)
    assert config.distributed.check_replica_hash == 10
    assert config.distributed.check_collectives


def test_evaluation_can_be_turned_off_beside_an_interval():
    config = parse_args(f"{GOOD} --eval-interval 5 --eval-iters 0".split(), world_size=1)
    assert "no evaluation: --eval-iters 0" in config.notices


def test_a_first_save_that_was_killed_before_its_tracker_can_be_loaded(tmp_path):
    line = f"{GOOD} --load {tmp_path}"
    (tmp_path / "iter_0000010").mkdir()
    with pytest.raises(ConfigError, match="has no checkpoint"):
        parse_args(line.split(), world_size=1)
    (tmp_path / "iter_0000010" / "manifest.json").write_text("{}")
    parse_args(line.split(), world_size=1)


@pytest.fixture
def data(tmp_path):
    """A dataset of 40 documents of 100 bytes, with its sidecar."""
    prefix = str(tmp_path / "my_data_text_document")
    builder = IndexedDatasetBuilder(bin_path(prefix), dtype=np.int32)
    for _ in range(40):
        builder.add_document(np.arange(100, dtype=np.int32), [100])
    builder.finalize(idx_path(prefix))
    write_sidecar(
        prefix,
        Sidecar(
            **describe_tokenizer(prefix, ByteTokenizer()),
            append_eod=True,
            documents=40,
            sequences=40,
            tokens=4000,
            dtype="int32",
            json_key="text",
        ),
    )
    return tmp_path / "my_data"


def test_the_tokenizer_comes_from_the_data(data):
    config = parse_args([*SHAPE.split(), "--data-path", str(data)], world_size=1)
    assert config.tokenizer.tokenizer_type == "ByteTokenizer"
    assert config.tokenizer.padded_vocab_size == 384
    assert config.data.seq_length == 1024
    assert config.training.train_iters == 1


def test_another_tokenizer_is_refused_with_both(data):
    line = f"{SHAPE} --data-path {data} --tokenizer-type NullTokenizer --vocab-size 300"
    with pytest.raises(ConfigError, match=r"ByteTokenizer.*257 ids.*NullTokenizer.*301 ids"):
        parse_args(line.split(), world_size=1)


def test_data_without_a_sidecar_needs_a_tokenizer(data):
    Path(f"{data}_text_document.json").unlink()
    line = f"{SHAPE} --data-path {data}"
    with pytest.raises(ConfigError, match=r"my_data_text_document.json.*give --tokenizer-type"):
        parse_args(line.split(), world_size=1)
    parse_args([*line.split(), "--tokenizer-type", "ByteTokenizer"], world_size=1)


RUNS = {
    "layout": "--num-experts 8 --expert-model-parallel-size 3",
    "typo": "--moe-rooter-topk 2",
    "missing file": "--tokenizer-type SentencePieceTokenizer --tokenizer-model no.model",
    "wrong type": "--lr fast",
    "megatron flag": "--moe-paged-stash",
    "load": "--load /no/such/folder",
}
PROGRAM = """
import runpy, sys
try:
    runpy.run_path("pretrain_gpt.py", run_name="__main__")
finally:
    sys.stderr.write("TORCH" if "torch" in sys.modules else "")
"""


@pytest.mark.parametrize("name", RUNS)
def test_the_program_exits_with_2_at_once_and_says_it_once(name):
    before = child_seconds()
    done = _run(["-c", PROGRAM, *GOOD.split(), *RUNS[name].split()])
    assert done.returncode == 2, done.stderr
    assert child_seconds() - before < 3
    assert done.stderr.count("invalid configuration") == 1
    assert "Traceback" not in done.stderr
    assert "TORCH" not in done.stderr
    assert done.stdout == ""


def test_other_ranks_are_silent():
    done = _run(["pretrain_gpt.py", *GOOD.split(), "--lr", "fast"], RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("flag", ["--help", "--version", "--print-config"])
def test_questions_are_answered_at_once(flag):
    before = child_seconds()
    done = _run(["-c", PROGRAM, *GOOD.split(), flag])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert child_seconds() - before < 3


def _run(command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
