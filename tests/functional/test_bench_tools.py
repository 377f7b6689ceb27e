"""Every bench runs, at sizes that take no time, and tells of what it says it measures."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.core.cpu_kernels.build import compiler
from tests.helpers.ranks import run_ranks
from tools.bench.moe_contenders import Contenders
from tools.bench.moe_layer import Tokens, peers_installed
from tools.bench.run_all import benches

ROOT = Path(__file__).parents[2]
SMALL = "--hidden-size 32 --vocab-size 64 --seq-length 16 --micro-batch-size 2 --rounds 1"
TINY = {
    "attention": "--tokens 32 --heads 2 --groups 1 --channels 16 --sequences 16 --rounds 1",
    "checkpoint": "--mib 2 --tensor-mib 0.1 --rounds 1",
    "cross_entropy": "--rows 300 --vocab-size 500 --rounds 1",
    "dispatcher": "--tokens 16 --hidden-size 16 --num-experts 4 --rounds 1 --dtypes fp32",
    "expert_overlap": "--num-layers 1 --hidden-size 16 --seq-length 8 --num-microbatches 2 "
    "--way-ms 1 --rounds 1",
    "gpu_kernels": "--device cpu --tokens 32 --hidden-size 16 --moe-ffn-hidden-size 24 --rounds 1",
    "gpu_mfu": "--device cpu --hidden-size 64 --moe-ffn-hidden-size 96 --num-attention-heads 4 "
    "--num-experts 4 --vocab-size 128 --seq-length 16 --rounds 1 --warm-up 1 --peak-tflops 1",
    "metrics_cost": SMALL,
    "moe_layer": "--tokens 32 --hidden-size 16 --moe-ffn-hidden-size 32 --cases 4x2 --rounds 1 "
    "--warm-up 1",
    "optimizer": "--parameters 1 --rounds 1",
    "overlap": "--compute-ms 1 --transfer-ms 1 --rounds 1 --hidden-size 16",
    "preprocess": "--megabytes 0.1 --vocab-size 400 --rounds 1 --workers 1",
    "profile_step": SMALL.replace("--rounds 1", "--top 999"),
    "sample_index": "--documents 100",
    "startup": "--rounds 1 --no-tools --ranks",
    "step": SMALL + " --parts steps roofline --dtypes fp32 bf16",
    "scaling": "--quick --hidden-size 32 --vocab-size 64 --seq-length 16 --sequences 8 16 "
    "--experts 4 8 --rounds 1 --warm-up 0 --curves sequence experts --dtypes fp32",
    "two_ranks": "--hidden-size 32 --num-layers 2 --vocab-size 64 --seq-length 16 --rounds 1 "
    "--warm-up 0 --dtypes fp32 --global-batch-size 4 --micro-batch-size 1 --layouts ep2 pp2",
}
SLOW = (
    *("checkpoint", "cross_entropy", "dispatcher", "expert_overlap", "metrics_cost", "optimizer"),
    *("overlap", "preprocess", "profile_step", "scaling", "startup", "two_ranks"),
)


@pytest.fixture(scope="module")
def run_bench(tmp_path_factory):
    """Return a function: name of a bench -> its rows."""
    done = {}

    def run(name: str) -> list[dict[str, object]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("bench")
            tool = ROOT / "tools" / "bench" / f"{name}.py"
            words = [sys.executable, str(tool), *TINY[name].split(), "--output", str(folder)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
            assert result.returncode == 0, result.stderr
            done[name] = json.loads((folder / f"{name}.json").read_text())["rows"]
        return done[name]

    return run


@pytest.mark.parametrize(
    "name",
    [pytest.param(p.stem, marks=[pytest.mark.slow] * (p.stem in SLOW)) for p in benches()],
)
def test_bench_runs(run_bench, name):
    rows = run_bench(name)
    assert rows
    for row in rows:
        for key, value in row.items():
            assert not key.endswith(("ms", "_s", "gflops")) or value is None or value > 0


def test_the_layer_is_timed_beside_its_limit_and_others_in_every_case(run_bench):
    rows = run_bench("moe_layer")
    cases = {(r["dtype"], r["routing"], r["mode"]) for r in rows}
    assert len(cases) == 2 * 2 * 2
    for dtype, routing, mode in cases:
        of_case = [
            r for r in rows if (r["dtype"], r["routing"], r["mode"]) == (dtype, routing, mode)
        ]
        shares = {r["what"]: r["share_of_limit"] for r in of_case if "share_of_limit" in r}
        assert {"limit", "grouped", "sequential", "textbook loop"} <= set(shares)
        assert shares["limit"] == 1.0
        parts = {r["what"] for r in of_case if r["what"].startswith("- ")}
        assert bool(parts) == (mode == "training")


@pytest.mark.slow
def test_a_profile_names_operations_kernels_and_their_callers(run_bench):
    rows = [r for r in run_bench("profile_step") if r["dtype"] == "bf16"]
    places = {r["what"]: r for r in rows}
    assert places["step"]["share"] == 1.0
    assert any(r["where"].startswith("tensor_parallel/cross_entropy.py:") for r in rows)
    if compiler() is not None:
        kernels = {r["what"]: r for r in rows if r["what"].startswith("kernel ")}
        assert kernels["kernel adamw"]["where"] == "cpu_kernels/flat_buffers.py"
        assert all(r["calls"] > 0 and r["milliseconds"] > 0 for r in kernels.values())


def _same_layer(mode: str) -> None:
    args = Namespace(
        tokens=40, hidden_size=16, moe_ffn_hidden_size=32, num_experts=4, moe_router_topk=2
    )
    tokens = Tokens(args, "fp32", "skewed")
    made = Contenders(args, "fp32", tokens.gate, peers_installed(), trains=mode == "training")
    found = {}
    for name, forward in made.forwards.items():
        made.forget_gradients()
        if made.trains:
            made.ddp.zero_grad_buffer()
        output = forward(tokens.tokens)
        output.backward(tokens.grad)
        stacks = [p for p in made.stacks if made.trains]
        # the router's gradient holds the balance loss in our layers only
        found[name] = [output.detach(), *(p.main_grad.clone() for p in stacks[1:])]
    for name, tensors in found.items():
        for got, want in zip(tensors, found["grouped"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["training", "standalone"])
def test_all_contenders_compute_the_same(mode):
    run_ranks(_same_layer, 1, mode)
