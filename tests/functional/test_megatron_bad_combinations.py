"""What Megatron-LM 0.19.2 accepts, or answers with a traceback: here exit code 2 and one message.

The program itself is run, all lines in one process; nothing of it may load torch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.arguments import parse_args
from tests.functional.bad_input import GOOD, MOE
from tests.helpers.processes import child_seconds

ROOT = Path(__file__).parents[2]

# what Megatron-LM does -> (world size, command line, what the one message must say)
REFUSED = {
    "assertion without a word: both precisions": (1, f"{GOOD} --fp16 --bf16", ["--fp16", "--bf16"]),
    "assertion without a word: heads": (
        1,
        f"{GOOD} --num-attention-heads 5",
        ["--hidden-size 64", "--num-attention-heads 5", "2, 4, 8"],
    ),
    "no suggestion for a misspelt flag": (
        1,
        f"{MOE} --moe-rooter-topk 2",
        ["--moe-rooter-topk", "did you mean --moe-router-topk?"],
    ),
    "KeyError: attention backend": (1, f"{GOOD} --attention-backend flsh", ["flsh", "flash"]),
    "TypeError: local attention": (1, f"{GOOD} --attention-backend local", ["local"]),
    "a message about another flag: global batch": (
        2,
        f"{GOOD} --global-batch-size 3",
        ["--global-batch-size 3", "2 data-parallel ranks"],
    ),
    "accepted: more experts per token than experts": (
        1,
        f"{MOE} --moe-router-topk 9",
        ["--moe-router-topk 9", "--num-experts 8"],
    ),
    "accepted: no expert per token": (1, f"{MOE} --moe-router-topk 0", ["--moe-router-topk 0"]),
    "accepted: negative coefficient": (
        1,
        f"{MOE} --moe-aux-loss-coeff -0.5",
        ["--moe-aux-loss-coeff -0.5 must be at least 0"],
    ),
    "accepted: negative coefficient of the z-loss": (
        1,
        f"{MOE} --moe-z-loss-coeff -1",
        ["--moe-z-loss-coeff -1 must be at least 0"],
    ),
    "accepted: capacity 0": (
        1,
        f"{MOE} --moe-expert-capacity-factor 0",
        ["--moe-expert-capacity-factor 0 must be above 0"],
    ),
    "accepted: a negative capacity means none": (
        1,
        f"{MOE} --moe-expert-capacity-factor -1",
        ["--moe-expert-capacity-factor -1 must be above 0"],
    ),
    "accepted: a pattern of another length": (
        1,
        f"{MOE} --moe-layer-freq ([0]*3+[1]*2)",
        ["--moe-layer-freq has 5 entries", "--num-layers 4"],
    ),
    "accepted: groups without their top-k": (
        1,
        f"{MOE} --moe-router-num-groups 4",
        ["--moe-router-num-groups and --moe-router-group-topk need each other"],
    ),
    "accepted: more groups than top-k": (
        1,
        f"{MOE} --moe-router-num-groups 4 --moe-router-group-topk 4",
        ["--moe-router-topk 2", "--moe-router-group-topk 4"],
    ),
    "accepted: sinkhorn with a balance loss": (
        1,
        f"{MOE} --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1",
        ["sinkhorn"],
    ),
    "accepted: experts' flags without experts": (
        1,
        f"{GOOD} --moe-router-topk 3 --moe-z-loss-coeff 0.1",
        ["--moe-router-topk 3", "--moe-z-loss-coeff 0.1", "--num-experts"],
    ),
    "accepted until the layer is built: flex without DeepEP": (
        1,
        f"{MOE} --moe-token-dispatcher-type flex",
        ["flex"],
    ),
    "refused only when the model is built: top-1 of a softmax": (
        1,
        f"{MOE} --moe-router-topk 1",
        ["--moe-router-topk 1", "--moe-router-pre-softmax"],
    ),
    "refused only when the model is built: bias of a softmax": (
        1,
        f"{MOE} --moe-router-enable-expert-bias",
        ["--moe-router-enable-expert-bias", "sigmoid"],
    ),
    "accepted: experts that do not divide": (
        2,
        f"{MOE} --num-experts 7 --expert-model-parallel-size 2".replace("--num-experts 8 ", ""),
        ["--expert-model-parallel-size 2", "--num-experts 7"],
    ),
    "ValueError: an advertised choice": (1, f"{GOOD} --rerun-mode report_stats", ["report_stats"]),
    "pattern that is evaluated": (
        1,
        f"{MOE} --moe-layer-freq [1]*4**9",
        ["--moe-layer-freq [1]*4**9"],
    ),
}
PROGRAM = """
import contextlib, io, json, os, runpy, sys
found = []
for world_size, line in json.load(sys.stdin):
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = ["pretrain_gpt.py", *line.split()]
    code, told = None, io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            runpy.run_path("pretrain_gpt.py", run_name="__main__")
        except SystemExit as end:
            code = end.code
    found.append([code, told.getvalue(), "torch" in sys.modules])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, bool]]:
    lines = [(world_size, line) for world_size, line, _ in REFUSED.values()]
    before = child_seconds()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0"},
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert child_seconds() - before < 1 + len(lines)
    return dict(zip(REFUSED, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_at_once_with_exit_code_2_and_one_message_with_the_values(name, answers):
    code, told, has_torch = answers[name]
    assert code == 2
    assert not has_torch
    assert told.count("invalid configuration") == 1
    assert "Traceback" not in told
    problems = [line for line in told.splitlines() if line.startswith("  - ")]
    assert len(problems) == 1, told
    for text in REFUSED[name][2]:
        assert text in problems[0]


@pytest.mark.parametrize(
    ("line", "derived"),
    [(GOOD, ["--lr", "--train-iters"]), (f"{MOE} --save /tmp/none", ["--moe-aux-loss-coeff"])],
)
def test_what_megatron_needs_or_leaves_off_is_derived_and_told(line, derived):
    config = parse_args(line.split(), world_size=1)
    for flag in derived:
        assert any(flag in notice for notice in config.notices), config.notices
