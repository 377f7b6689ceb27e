"""The table of MoE flags: two command lines for each, and what must differ between them.

A row for a new flag: its name, the flags that both runs have, the flags of the second run alone,
and an observer: whatever is cheapest to look at and could not differ by chance.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron.core.models.gpt.moe_module_specs import EXPERTS
from megatron.core.parallel_layout import rank_groups
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import World
from megatron.training.run import Run, TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import train_step
from megatron.training.upcycling.online import after_upcycling
from tests.helpers.small_runs import save
from tests.unit_tests.training.tiny_run import (
    SAMPLES,
    SEQ,
    VOCAB,
    plain_forward_step,
    tiny_batches,
    tiny_model,
)

ROOT = Path(__file__).parents[2]
BASE = (
    f"--mock-data --vocab-size {VOCAB - 1} --num-layers 2 --hidden-size 16 --seq-length {SEQ} "
    f"--num-attention-heads 2 --micro-batch-size 2 --global-batch-size {SAMPLES} --device cpu "
    "--train-iters 10 --lr 1e-2 --lr-decay-style constant --init-method-std 0.3"
)


def trained(line: str) -> object:
    """Every parameter and buffer after two steps, to the bit."""
    run = _run(line)
    for iteration in range(2):
        state = TrainState(iteration=iteration, consumed_samples=iteration * SAMPLES)
        train_step(run, state, tiny_batches(run))
    tensors = [*run.model.module.named_parameters(), *run.model.module.named_buffers()]
    return {name: _digest(tensor.detach()) for name, tensor in tensors}


def built(line: str) -> object:
    """Classes of all modules, shapes and dtypes of all parameters and buffers."""
    model = _run(line).model.module
    tensors = [*model.named_parameters(), *model.named_buffers()]
    classes = [(name, type(module).__name__) for name, module in model.named_modules()]
    parts = [
        (name, type(part).__name__)
        for name, module in model.named_modules()
        for part in vars(module).values()
        if "Dispatcher" in type(part).__name__  # no module, so not among the classes
    ]
    return classes, parts, [(name, tuple(t.shape), t.dtype) for name, t in tensors]


def expert_rows(line: str) -> object:
    """Rows of each expert of each MoE layer in a first forward."""
    run, seen = _run(line), []
    for module in run.model.module.modules():
        if isinstance(module, tuple(EXPERTS.values())):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].tolist()))
    train_step(run, TrainState(), tiny_batches(run))
    return seen


def reported(line: str) -> object:
    """Names of the metrics after a step."""
    run = _run(line)
    train_step(run, TrainState(), tiny_batches(run))
    assert run.moe_metrics is not None
    return sorted(run.moe_metrics.report(run.world.pg_collection).scalars())


def node_groups(line: str) -> object:
    """Which of 4 ranks are neighbours within a node; no rank is started."""
    grid = parse_args(f"{BASE} {line}".split(), world_size=4).model.layout(4).node_grid()
    return rank_groups(grid, ("ep_node",))


def replays(line: str) -> object:
    """Classes of what is kept beside the modules."""
    modules = _run(line).model.module.modules()
    return sorted({type(part).__name__ for m in modules for part in vars(m).values()})


def left_behind(line: str) -> object:
    """Figures of a short run of the program, and the sizes of the files of its trace."""
    words = f"{BASE} {line} --log-dir logs --log-interval 1 --eval-iters 0".replace(
        "--train-iters 10", "--train-iters 3"
    )
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    with TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, str(ROOT / "pretrain_gpt.py"), *words.split()],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k not in ranks} | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
        metrics = (Path(folder) / "logs/metrics.jsonl").read_text().splitlines()
        files = [path for path in sorted(Path(folder).glob("TRACE/**/*")) if path.is_file()]
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        return sizes, sorted({key for row in metrics for key in json.loads(row)})


def order(line: str) -> object:
    """In which order the parts of a MoE layer are called."""
    run, seen = _run(line), []
    for name, module in run.model.module.named_modules():
        if ".mlp." in name:
            module.register_forward_pre_hook(lambda _, __, name=name: seen.append(name))
    train_step(run, TrainState(), tiny_batches(run))
    return seen


def expert_functions(line: str) -> object:
    """Which autograd functions the experts are made of."""
    run, seen = _run(line), []
    for module in run.model.module.modules():
        if isinstance(module, tuple(EXPERTS.values())):
            module.register_forward_hook(lambda _, __, out: seen.append(out[0].grad_fn.name()))
    train_step(run, TrainState(), tiny_batches(run))
    return seen


def begun(line: str) -> object:
    """The weights of experts with which a run begins, from a dense checkpoint in DENSE."""
    with TemporaryDirectory() as folder:
        save(Path(folder) / "dense", _run(""), 2)
        words = line.replace("DENSE", f"{folder}/dense").replace("OWN", f"{folder}/own")
        run = _run(words)
        config = after_upcycling(run.config, dist.group.WORLD)
        load_checkpoint(
            config.checkpoint.load, config=config, model=run.model, optimizer=run.optimizer
        )
        tensors = run.model.module.named_parameters()
        return {name: _digest(tensor.detach()) for name, tensor in tensors if "experts" in name}


class Case(NamedTuple):
    """Two command lines that differ in one flag, and where to see it."""

    observe: Callable[[str], object]
    both: str
    """Flags of both runs beside ``BASE``."""
    second: str
    """Flags of the second run alone."""
    first: str = ""
    """Flags of the first run alone, where the flag is not simply absent."""


MOE = "--num-experts 8"
LIMITED = f"{MOE} --moe-expert-capacity-factor 0.5"
BIASED = f"{MOE} --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
HOPS = f"{MOE} --moe-token-dispatcher-type alltoall_hierarchical"

CASES: dict[str, Case] = {
    "--moe-layer-freq": Case(built, MOE, "--moe-layer-freq 2"),
    "--moe-ffn-hidden-size": Case(built, MOE, "--moe-ffn-hidden-size 24"),
    "--moe-shared-expert-intermediate-size": Case(
        trained, MOE, "--moe-shared-expert-intermediate-size 12"
    ),
    "--moe-shared-expert-gate": Case(
        trained, f"{MOE} --moe-shared-expert-intermediate-size 12", "--moe-shared-expert-gate"
    ),
    "--moe-latent-size": Case(built, MOE, "--moe-latent-size 8"),
    "--moe-router-topk": Case(expert_rows, MOE, "--moe-router-topk 3"),
    "--moe-router-pre-softmax": Case(trained, MOE, "--moe-router-pre-softmax"),
    "--moe-router-score-function": Case(trained, MOE, "--moe-router-score-function sigmoid"),
    "--moe-router-topk-scaling-factor": Case(trained, MOE, "--moe-router-topk-scaling-factor 2.5"),
    "--moe-router-num-groups": Case(
        expert_rows,
        f"{MOE} --moe-router-group-topk 1",
        "--moe-router-num-groups 4",
        "--moe-router-num-groups 2",
    ),
    "--moe-router-group-topk": Case(
        expert_rows,
        f"{MOE} --moe-router-num-groups 4",
        "--moe-router-group-topk 1",
        "--moe-router-group-topk 2",
    ),
    "--moe-router-group-score-topk": Case(
        expert_rows,
        f"{MOE} --moe-router-num-groups 2 --moe-router-group-topk 1",
        "--moe-router-group-score-topk 1",
        "--moe-router-group-score-topk 4",
    ),
    "--moe-router-bias": Case(built, MOE, "--moe-router-bias"),
    "--moe-router-enable-expert-bias": Case(
        built, f"{MOE} --moe-router-score-function sigmoid", "--moe-router-enable-expert-bias"
    ),
    "--moe-router-bias-update-rate": Case(trained, BIASED, "--moe-router-bias-update-rate 0.1"),
    "--moe-input-jitter-eps": Case(trained, MOE, "--moe-input-jitter-eps 0.1"),
    "--moe-router-force-load-balancing": Case(
        expert_rows, MOE, "--moe-router-force-load-balancing"
    ),
    "--moe-router-dtype": Case(trained, MOE, "--moe-router-dtype fp64"),
    "--moe-router-load-balancing-type": Case(
        reported, MOE, "--moe-router-load-balancing-type seq_aux_loss"
    ),
    "--moe-aux-loss-coeff": Case(trained, MOE, "--moe-aux-loss-coeff 0.5"),
    "--moe-z-loss-coeff": Case(trained, MOE, "--moe-z-loss-coeff 0.1"),
    "--moe-token-dispatcher-type": Case(built, MOE, "--moe-token-dispatcher-type allgather"),
    "--moe-dispatcher-node-size": Case(
        node_groups,
        f"{HOPS} --expert-model-parallel-size 4",
        "--moe-dispatcher-node-size 2",
        "--moe-dispatcher-node-size 4",
    ),
    "--moe-expert-capacity-factor": Case(trained, MOE, "--moe-expert-capacity-factor 0.5"),
    "--moe-token-drop-policy": Case(trained, LIMITED, "--moe-token-drop-policy position"),
    "--moe-pad-expert-input-to-capacity": Case(
        expert_rows, LIMITED, "--moe-pad-expert-input-to-capacity"
    ),
    "--moe-experts-type": Case(built, MOE, "--moe-experts-type sequential"),
    "--moe-router-quantile-balancing-ema": Case(
        trained,
        f"{MOE} --moe-router-load-balancing-type quantile_balancing",
        "--moe-router-quantile-balancing-ema 0.5",
    ),
    "--moe-router-force-biased": Case(expert_rows, MOE, "--moe-router-force-biased 2"),
    "--moe-enable-routing-replay": Case(replays, MOE, "--moe-enable-routing-replay"),
    "--moe-num-experts-per-layer": Case(built, MOE, "--moe-num-experts-per-layer [8,4]"),
    "--moe-router-topk-per-layer": Case(expert_rows, MOE, "--moe-router-topk-per-layer [2,3]"),
    "--moe-router-type": Case(expert_rows, MOE, "--moe-router-type expert_choice"),
    "--moe-per-layer-logging": Case(left_behind, MOE, "--moe-per-layer-logging"),
    "--moe-routing-trace-path": Case(left_behind, MOE, "--moe-routing-trace-path TRACE"),
    "--moe-routing-trace-max-training-iters": Case(
        left_behind,
        f"{MOE} --moe-routing-trace-path TRACE",
        "--moe-routing-trace-max-training-iters 1",
    ),
    "--moe-routing-trace-max-mb": Case(
        left_behind, f"{MOE} --moe-routing-trace-path TRACE", "--moe-routing-trace-max-mb 0.001"
    ),
    "--moe-grouped-mm-backend": Case(
        expert_functions, MOE, "--moe-grouped-mm-backend torch_native"
    ),
    "--moe-fused-activation": Case(
        trained, f"{MOE} --swiglu --disable-bias-linear", "--moe-fused-activation off"
    ),
    "--moe-expert-chunk-tokens": Case(expert_rows, MOE, "--moe-expert-chunk-tokens 5"),
    "--moe-use-upcycling": Case(begun, MOE, "--moe-use-upcycling --load DENSE --save OWN"),
    "--moe-upcycling-granularity": Case(
        begun,
        f"{MOE} --moe-use-upcycling --load DENSE --save OWN --moe-ffn-hidden-size 16",
        "--moe-upcycling-granularity 2 --moe-shared-expert-intermediate-size 32",
        "--moe-shared-expert-intermediate-size 48",
    ),
    "--moe-shared-expert-overlap": Case(
        order,
        f"{MOE} --moe-shared-expert-intermediate-size 12",
        "--moe-shared-expert-overlap",
    ),
}


def _run(line: str) -> Run:
    """Build the run of a command line, in this process alone."""
    config = parse_args(f"{BASE} {line}".split(), world_size=1)
    groups = ProcessGroupCollection.create(config.model.layout(dist.get_world_size()))
    world = World(rank=0, world_size=1, device=torch.device("cpu"), pg_collection=groups)
    return setup_run(config, world, tiny_model, plain_forward_step)


def _digest(tensor: torch.Tensor) -> Any:
    return sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
