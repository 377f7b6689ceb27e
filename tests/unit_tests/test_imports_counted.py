"""What a process loads is what a user waits for: help pages without torch, runs without the rest.

Modules are counted, never seconds. A run may load what its flags need, so it is asked with few.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.start_clock import StartClock
from tools.bench.startup import spent_of, tools

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch._dynamo",  # a second; the first optimizer of torch.optim
    "torch._inductor",
    "sympy",
    "torch.distributed.checkpoint",  # 0.6 s; the first save or load
    "torch.distributed.fsdp",  # 0.6 s; --use-torch-fsdp2
    "torch.distributed.tensor",
    "torch.onnx",
    "matplotlib",  # half a second; the picture at the end
    "transformers",
    "tokenizers",
    "sentencepiece",
    "tensorboard",
    "pandas",
    "scipy",
    "megatron.training.dry_run.command",
    "megatron.training.huggingface",
    "megatron.training.upcycling.online",
}
NOT_FOR_HELP = HEAVY | {"torch", "numpy.random", "safetensors", "tqdm"}
HELP_MODULES = 400
"""Modules of a process that shows the help page of training: 371 when this was written."""
OWN_MODULES = 350
"""Modules of megatron in a process that trains: 307 when this was written."""

# trains one step, then writes what is loaded
ONE_STEP = """
import json, sys
import pretrain_gpt as script
from megatron.training.arguments import parse_args
config = parse_args(sys.argv[1:])
from megatron.training import pretrain
class Watch:
    def after_load(self, run, state): pass
    def after_step(self, run, state, outcome):
        print("LOADED" + json.dumps(sorted(sys.modules)))
pretrain(
    script.train_valid_test_datasets_provider, script.model_provider, script.forward_step,
    config=config, observers=(Watch(),),
)
"""
FLAGS = (
    "--mock-data --vocab-size 63 --num-layers 1 --hidden-size 16 --num-attention-heads 2 "
    "--num-experts 4 --moe-router-topk 2 --swiglu --normalization RMSNorm --seq-length 16 "
    "--micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3 --eval-iters 0 "
    "--device cpu --bf16"
)


def loaded(*words: str) -> set[str]:
    """Return the modules that a program has loaded when it writes them after LOADED."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert lines, done.stderr[-2000:]
    return set(json.loads(lines[0].removeprefix("LOADED")))


def with_help(script: Path) -> set[str]:
    """Return the modules loaded when ``script --help`` ends."""
    code = (
        "import json, runpy, sys\n"
        "path = sys.argv[1]; sys.argv = [path, '--help']; sys.path.insert(0, '.')\n"
        "try: runpy.run_path(path, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('\\nLOADED' + json.dumps(sorted(sys.modules)))\n"
    )
    return loaded("-c", code, str(script))


def test_the_help_page_of_training_loads_little() -> None:
    modules = with_help(ROOT / "pretrain_gpt.py")
    assert not sorted(modules & NOT_FOR_HELP)
    assert len(modules) <= HELP_MODULES, len(modules)


@pytest.mark.parametrize(
    "tool",
    [
        pytest.param(
            tool,
            marks=() if tool.stem in ("preprocess_data", "generate") else pytest.mark.slow,
            id=str(tool.relative_to(ROOT)),
        )
        for tool in tools()
        if tool.name != "verify_upcycling.py"  # for developers: it names its cases from torch
    ],
)
def test_help_pages_of_tools_load_no_torch(tool: Path) -> None:
    assert not sorted(with_help(tool) & NOT_FOR_HELP)


def test_a_training_step_loads_only_what_its_flags_need(tmp_path: Path) -> None:
    modules = loaded("-c", ONE_STEP, *FLAGS.split(), "--log-dir", str(tmp_path))
    assert "torch" in modules
    assert not sorted(modules & HEAVY)
    own = {name for name in modules if name.split(".")[0] == "megatron"}
    assert len(own) <= OWN_MODULES, len(own)


def test_the_bench_reads_the_line_of_a_run() -> None:
    clock = StartClock()
    clock.mark("process groups")
    line = " > first step done 3.25 s after the launch of this rank, 2.50 s of them on processors: "
    line += "options 0.25, process groups 0.50, first step 2.50\n"
    spent = spent_of(line, 4.0)
    assert spent.phases == {"options": 0.25, "process groups": 0.5, "first step": 2.5}
    assert (spent.wall, spent.processor) == (4.0, 2.5)
    assert spent_of(clock.line(), 1.0).processor > 0  # the real line has the same form
