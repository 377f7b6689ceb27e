"""Small runs of one rank that train a few steps, save, and go on from a checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args
from megatron.training.checkpoint_state import TrainState
from megatron.training.checkpointing import load_checkpoint, save_checkpoint, unwrap
from megatron.training.initialize import World
from megatron.training.run import Run
from megatron.training.setup_model import setup_run
from megatron.training.train_step import train_step
from tests.unit_tests.training.tiny_run import (
    SAMPLES,
    SEQ,
    VOCAB,
    plain_forward_step,
    tiny_batches,
    tiny_model,
)

# Adam's eps and clipping see the size of a gradient, and copies have a share of it each. A bias of
# keys has no gradient but rounding, which Adam makes steps of.
BASE = (
    f"--mock-data --vocab-size {VOCAB - 1} --num-layers 2 --hidden-size 16 --swiglu "
    f"--num-attention-heads 2 --seq-length {SEQ} --global-batch-size {SAMPLES} --device cpu "
    "--micro-batch-size 4 --train-iters 10 --lr 1e-2 --lr-decay-style constant --eval-iters 1 "
    "--clip-grad 0 --adam-eps 1e-30 --disable-bias-linear"
)


class Steps(NamedTuple):
    """What some steps of training gave."""

    losses: list[float]
    tensors: dict[str, Tensor]
    """Weights, buffers and moments after them."""


@contextmanager
def alone_in_the_world() -> Iterator[None]:
    """A world of one rank in this process, gone afterwards: tests that fork ranks find none."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tensors_of(run: Run) -> dict[str, Tensor]:
    found = model_tensors(unwrap(run.model)) | optimizer_tensors(run.optimizer.named_state())
    return {key: tensor.clone() for key, tensor in found.items()}


def steps(run: Run, number: int, first: int = 0) -> Steps:
    """Train on the same batch again and again, so the place in the data does not matter."""
    state, data, losses = TrainState(iteration=first), tiny_batches(run), []
    for _ in range(number):
        losses.append(train_step(run, state, data).lm_loss)
        state.iteration += 1
        state.consumed_samples += SAMPLES
    return Steps(losses, tensors_of(run))


def new_run(flags: str) -> Run:
    """Build a run with 4 experts in fp64, unless said otherwise; ``--fp32`` says so too."""
    flags = flags.replace('"', "")
    flags += " --fp64" * ("--bf16" not in flags and "--fp32" not in flags)
    flags = flags.replace("--fp32", "")
    flags += " --num-experts 4" * (
        "--num-experts " not in flags and "--moe-num-experts-per-layer" not in flags
    )
    balanced = "load-balancing" in flags or "--moe-aux" in flags or "expert_choice" in flags
    flags += " --moe-router-load-balancing-type none" * (not balanced)
    config = parse_args(f"{BASE} {flags}".split(), world_size=1)
    world = World(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        pg_collection=ProcessGroupCollection.create(config.model.layout(1)),
    )
    run = setup_run(config, world, tiny_model, plain_forward_step)
    _move_biases(unwrap(run.model))
    return run


def _move_biases(model: nn.Module) -> None:
    """Move expert biases and prices off 0, where each is as good as another."""
    generator = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith(("expert_bias", "qb_beta")):
            buffer.copy_(0.01 * torch.randn(buffer.shape, generator=generator))


def saved(
    folder: Path, flags: str, prepare: Callable[[Run], None] | None = None, iteration: int = 2
) -> Run:
    """Train to ``iteration`` and save; the run can go on."""
    torch.manual_seed(0)
    run = new_run(flags)
    if prepare is not None:
        prepare(run)
    steps(run, iteration)
    save(folder, run, iteration)
    return run


def save(folder: Path, run: Run, iteration: int) -> None:
    """Save a run where it stands."""
    samples = iteration * SAMPLES
    state = TrainState(iteration=iteration, consumed_samples=samples, dropout_seed=1)
    done = save_checkpoint(
        folder, state, config=run.config, model=run.model, optimizer=run.optimizer
    )
    assert done.error == ""


def loaded(folder: Path, flags: str) -> Run:
    """Build the run that goes on from a checkpoint."""
    run = new_run(flags)
    state = load_checkpoint(folder, config=run.config, model=run.model, optimizer=run.optimizer)
    assert state.iteration == 2
    return run
