"""What users get wrong is answered at once: what, the values, what to do; all of it together."""

import os
import subprocess
import sys
import time
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

ROOT = Path(__file__).parents[2]
SHAPE = "--num-layers 4 --hidden-size 64"
GOOD = f"{SHAPE} --mock-data"
MOE = f"{GOOD} --num-experts 8"

# name -> (world size, command line, what the message must say)
BAD: dict[str, tuple[int, str, list[str]]] = {
    "no model": (1, "--mock-data", ["--num-layers is missing", "--hidden-size is missing"]),
    "no data": (1, SHAPE, ["--data-path PREFIX", "--mock-data"]),
    "both precisions": (1, f"{GOOD} --bf16 --fp64", ["--bf16 and --fp64 exclude each other"]),
    "fp16": (1, f"{GOOD} --fp16 --bf16", ["--fp16", "use --bf16"]),
    "typo": (1, f"{MOE} --moe-rooter-topk 2", ["did you mean --moe-router-topk?"]),
    "abbreviation": (1, f"{MOE} --moe-router-top 2", ["did you mean --moe-router-topk?"]),
    "attention backend": (1, f"{GOOD} --attention-backend flsh", ["did you mean flash?"]),
    "wrong type": (1, f"{GOOD} --lr fast", ["--lr fast: must be a number"]),
    "wrong choice": (1, f"{GOOD} --lr-decay-style cosin", ["did you mean cosine?"]),
    "flex dispatcher": (
        1,
        f"{MOE} --moe-token-dispatcher-type flex",
        ["alltoall_dedup"],
    ),
    "pre-softmax of sigmoid": (
        1,
        f"{MOE} --moe-router-score-function sigmoid --moe-router-pre-softmax",
        ["no effect with --moe-router-score-function sigmoid"],
    ),
    "scaling by 0": (1, f"{MOE} --moe-router-topk-scaling-factor 0", ["must be above 0"]),
    "tensor parallel": (4, f"{MOE} --tensor-model-parallel-size 2", ["not offered yet, only 1"]),
    "pipeline": (4, f"{GOOD} --pipeline-model-parallel-size 4", ["not offered yet, only 1"]),
    "ep of experts": (
        4,
        f"{MOE} --expert-model-parallel-size 3",
        ["does not divide --num-experts 8", "world size 4", "here: 1, 2, 4"],
    ),
    "ep of world": (
        2,
        f"{MOE} --expert-model-parallel-size 4",
        ["does not divide the world size 2", "here: 1, 2"],
    ),
    "ep of nothing": (2, f"{GOOD} --expert-model-parallel-size 2", ["needs --num-experts"]),
    "heads": (
        1,
        f"{GOOD} --num-attention-heads 5",
        ["--hidden-size 64 must be a multiple of --num-attention-heads 5", "fit: 2, 4, 8"],
    ),
    "groups": (
        1,
        f"{GOOD} --num-attention-heads 8 --group-query-attention --num-query-groups 3",
        ["--num-query-groups 3 must divide --num-attention-heads 8", "fit: 1, 2, 4"],
    ),
    "groups alone": (1, f"{GOOD} --num-query-groups 2", ["no effect without --group-query"]),
    "odd rope": (
        1,
        f"{GOOD} --num-attention-heads 64 --position-embedding-type rope",
        ["head size 1", "must be even"],
    ),
    "rotary alone": (1, f"{GOOD} --rotary-base 500", ["no effect without --position-embedding"]),
    "reset positions": (
        1,
        f"{GOOD} --position-embedding-type rope --reset-position-ids",
        ["--reset-position-ids has no effect with --position-embedding-type rope"],
    ),
    "reset no positions": (
        1,
        f"{GOOD} --position-embedding-type none --reset-position-ids",
        ["--reset-position-ids has no effect with --position-embedding-type none"],
    ),
    "no positions": (1, f"{GOOD} --no-position-embedding", ["rope or none"]),
    "long samples": (
        1,
        f"{GOOD} --seq-length 2048 --max-position-embeddings 1024",
        ["--seq-length 2048 must not be larger than --max-position-embeddings 1024"],
    ),
    "topk 9": (1, f"{MOE} --moe-router-topk 9", ["between 1 and --num-experts 8"]),
    "topk 0": (1, f"{MOE} --moe-router-topk 0", ["--moe-router-topk 0 must be at least 1"]),
    "topk 1": (1, f"{MOE} --moe-router-topk 1", ["needs --moe-router-pre-softmax"]),
    "moe without experts": (
        1,
        f"{GOOD} --moe-router-topk 2 --moe-grouped-gemm",
        ["--moe-router-topk 2, --moe-grouped-gemm need a MoE layer"],
    ),
    "negative coefficient": (1, f"{MOE} --moe-aux-loss-coeff -0.1", ["must be at least 0"]),
    "two coefficients": (1, f"{MOE} --moe-aux-loss-coeff 0.1 0.2", ["has 2 values for the 1"]),
    "balancing twice": (
        1,
        f"{MOE} --moe-router-load-balancing-type aux_loss aux_loss",
        ["names one way twice"],
    ),
    "balancing and none": (
        1,
        f"{MOE} --moe-router-load-balancing-type aux_loss none",
        ["none excludes the others"],
    ),
    "coefficient of none": (
        1,
        f"{MOE} --moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1",
        ["no effect with --moe-router-load-balancing-type none"],
    ),
    "sinkhorn": (1, f"{MOE} --moe-router-load-balancing-type sinkhorn", ["global_aux_loss, none"]),
    "capacity": (1, f"{MOE} --moe-expert-capacity-factor 0", ["must be above 0"]),
    "nodes that cut groups": (
        4,
        f"{MOE} --expert-model-parallel-size 4 --moe-dispatcher-node-size 3 "
        "--moe-token-dispatcher-type alltoall_hierarchical",
        ["--moe-dispatcher-node-size 3 must divide", "that fit: 1, 2, 4"],
    ),
    "nodes of another dispatcher": (
        1,
        f"{MOE} --moe-dispatcher-node-size 2",
        ["no effect without --moe-token-dispatcher-type alltoall_hierarchical"],
    ),
    "padding without capacity": (
        1,
        f"{MOE} --moe-pad-expert-input-to-capacity --moe-token-drop-policy position",
        ["have no effect without --moe-expert-capacity-factor"],
    ),
    "gate of no shared expert": (
        1,
        f"{MOE} --moe-shared-expert-gate",
        ["needs shared experts: add --moe-shared-expert-intermediate-size"],
    ),
    "shared experts of width 0": (
        1,
        f"{MOE} --moe-shared-expert-intermediate-size 0",
        ["must be at least 1"],
    ),
    "latent space of width 0": (1, f"{MOE} --moe-latent-size 0", ["must be at least 1"]),
    "bias of softmax": (
        1,
        f"{MOE} --moe-router-enable-expert-bias",
        ["needs --moe-router-score-function sigmoid or sqrtsoftplus"],
    ),
    "rate of no bias": (
        1,
        f"{MOE} --moe-router-bias-update-rate 0.1",
        ["no effect without --moe-router-enable-expert-bias"],
    ),
    "jitter of 1": (1, f"{MOE} --moe-input-jitter-eps 1", ["must be above 0 and below 1"]),
    "groups without top-k": (1, f"{MOE} --moe-router-num-groups 2", ["need each other"]),
    "top-k of no groups": (1, f"{MOE} --moe-router-group-topk 2", ["need each other"]),
    "groups of 8 experts": (
        1,
        f"{MOE} --moe-router-num-groups 3 --moe-router-group-topk 2",
        ["--moe-router-num-groups 3 must divide --num-experts 8"],
    ),
    "more groups than top-k": (
        1,
        f"{MOE} --moe-router-num-groups 4 --moe-router-group-topk 4",
        ["--moe-router-topk 2 must be a multiple of --moe-router-group-topk 4"],
    ),
    "more groups than groups": (
        1,
        f"{MOE} --moe-router-num-groups 2 --moe-router-group-topk 4 --moe-router-topk 4",
        ["must not be larger than --moe-router-num-groups 2"],
    ),
    "groups too small": (
        1,
        f"{MOE} --moe-router-num-groups 4 --moe-router-group-topk 1 --moe-router-topk 4",
        ["does not fit in --moe-router-group-topk 1 groups of 2 experts"],
    ),
    "grouped and sequential": (
        1,
        f"{MOE} --moe-grouped-gemm --moe-experts-type sequential",
        ["contradicts --moe-experts-type sequential"],
    ),
    "short pattern": (
        1,
        f"{MOE} --moe-layer-freq [0,1]",
        ["has 2 entries, one for each of --num-layers 4"],
    ),
    "pattern of twos": (1, f"{MOE} --moe-layer-freq [0,1,2,1]", ["entries are 0", "holds 2"]),
    "pattern of zeros": (1, f"{MOE} --moe-layer-freq [0]*4", ["makes no layer MoE"]),
    "pattern that runs": (1, f"{MOE} --moe-layer-freq exit(3)", ["may hold only whole numbers"]),
    "frequency 0": (1, f"{MOE} --moe-layer-freq 0", ["must be at least 1"]),
    "batch": (
        2,
        f"{GOOD} --micro-batch-size 2 --global-batch-size 6",
        ["--global-batch-size 6", "--micro-batch-size 2 x 2 data-parallel ranks (= 4)", "4 or 8"],
    ),
    "batch of 3": (2, f"{GOOD} --global-batch-size 3", ["--global-batch-size 3", "x 2 data"]),
    "dropout": (1, f"{GOOD} --hidden-dropout 1.0", ["at least 0 and below 1"]),
    "negative lr": (1, f"{GOOD} --lr -1", ["--lr -1 must be at least 0"]),
    "min lr": (
        1,
        f"{GOOD} --lr 1e-4 --min-lr 1e-3",
        ["--min-lr 0.001 must lie between 0 and --lr"],
    ),
    "warm-up": (
        1,
        f"{GOOD} --train-iters 10 --lr-warmup-iters 10",
        [
            "warm-up of 40 samples must end before the decay does, at 40",
            "here: --lr-warmup-iters 10, --train-iters 10, --global-batch-size 4",
        ],
    ),
    "warm-up init": (
        1,
        f"{GOOD} --lr 1e-4 --lr-warmup-iters 2 --lr-warmup-init 1e-3",
        ["--lr-warmup-init 0.001 must lie between 0 and --lr 0.0001"],
    ),
    "two warm-ups": (
        1,
        f"{GOOD} --lr-warmup-iters 1 --lr-warmup-fraction 0.1",
        ["exclude each other"],
    ),
    "WSD": (1, f"{GOOD} --lr-decay-style WSD", ["needs --lr-wsd-decay-iters"]),
    "WSD options": (1, f"{GOOD} --lr-wsd-decay-iters 3", ["without --lr-decay-style WSD"]),
    "long final decay": (
        1,
        f"{GOOD} --train-iters 10 --lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-iters 5",
        [
            "--lr-wsd-decay-iters (= 32 samples) must",
            "(= 20 samples); here: --lr-warmup-iters 5, --train-iters 10, "
            "--lr-wsd-decay-iters 8, --global-batch-size 4",
        ],
    ),
    "falling weight decay": (
        1,
        f"{GOOD} --weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
        ["--start-weight-decay 0.2 must lie between 0 and --end-weight-decay 0.1"],
    ),
    "constant weight decay": (
        1,
        f"{GOOD} --start-weight-decay 0.2 --end-weight-decay 0.1",
        ["no effect with --weight-decay-incr-style constant"],
    ),
    "weight decay": (1, f"{GOOD} --weight-decay-incr-style cosine", ["--start-weight-decay and"]),
    "adam flags": (1, f"{GOOD} --optimizer sgd --adam-beta1 0.5", ["with --optimizer sgd"]),
    "sgd flags": (1, f"{GOOD} --sgd-momentum 0.5", ["no effect with --optimizer adam"]),
    "save interval": (1, f"{GOOD} --save-interval 5", ["no effect without --save"]),
    "keep last": (1, f"{GOOD} --save x --keep-last 0", ["--keep-last 0 must be at least 1"]),
    "load": (1, f"{GOOD} --load /no/such/folder", ["is no folder", "--allow-fresh-start"]),
    "finetune": (1, f"{GOOD} --finetune", ["no effect without --load"]),
    "nccl on cpu": (1, f"{GOOD} --device cpu --distributed-backend nccl", ["needs --device cuda"]),
    "two sources": (1, f"{GOOD} --data-path x", ["no effect with --mock-data"]),
    "split words": (1, f"{SHAPE} --data-path x --split a,b", ["--split"]),
    "missing data": (1, f"{SHAPE} --data-path x", ["x.bin", "x_text_document.idx"]),
    "null tokenizer": (1, f"{GOOD} --tokenizer-type NullTokenizer", ["needs --vocab-size"]),
    "tokenizer file": (
        1,
        f"{GOOD} --tokenizer-type SentencePieceTokenizer --tokenizer-model no.model",
        ["no.model does not exist"],
    ),
    "tokenizer files": (1, f"{GOOD} --tokenizer-type GPT2BPETokenizer", ["--vocab-file"]),
    "padded vocabulary": (1, f"{GOOD} --vocab-size 500 --padded-vocab-size 100", ["501 ids"]),
    "tensorboard": (1, f"{GOOD} --tensorboard-log-interval 5", ["without --tensorboard-dir"]),
    "yaml file": (1, f"{GOOD} --yaml-cfg /no/such.yaml", ["cannot be read"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_its_values_and_a_way_out(name):
    world_size, line, wanted = BAD[name]
    with pytest.raises(ConfigError) as error:
        parse_args(line.split(), world_size=world_size)
    for text in wanted:
        assert text in str(error.value)
    problems = str(error.value).splitlines()[1:]
    assert len(problems) <= max(2, len(wanted)), "one mistake makes no cascade of messages"


def test_all_problems_are_listed_at_once():
    line = (
        f"{MOE} --fp16 --moe-router-topk 9 --lr -1 --save-interval 3 --expert-model-parallel-size 3"
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
        "--use-mcore-models --moe-grouped-gemm --local-rank 0 --sequence-parallel "
        "--position-embedding-type rope --no-position-embedding "
        "--moe-layer-freq ([0]*2+[1]*2)".split(),
        world_size=2,
    )
    assert core_transformer_config_from_args(config).moe_layer_pattern == (False, False, True, True)
    assert sum("has no effect" in notice for notice in config.notices) == 5


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
    start = time.monotonic()
    done = _run(["-c", PROGRAM, *GOOD.split(), *RUNS[name].split()])
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - start < 3
    assert done.stderr.count("invalid configuration") == 1
    assert "Traceback" not in done.stderr
    assert "TORCH" not in done.stderr
    assert done.stdout == ""


def test_other_ranks_are_silent():
    done = _run(["pretrain_gpt.py", *GOOD.split(), "--lr", "fast"], RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("flag", ["--help", "--version", "--print-config"])
def test_questions_are_answered_at_once(flag):
    start = time.monotonic()
    done = _run(["-c", PROGRAM, *GOOD.split(), flag])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert time.monotonic() - start < 3


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
