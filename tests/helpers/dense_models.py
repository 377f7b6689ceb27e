"""Small dense models of three families with weights that hide nothing, saved as checkpoints."""

from pathlib import Path

import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import unwrap
from megatron.training.initialize import World
from megatron.training.run import Run
from megatron.training.setup_model import setup_run
from tests.helpers.small_runs import save
from tests.unit_tests.training.tiny_run import SAMPLES, SEQ, VOCAB, plain_forward_step, tiny_model

BASE = (
    f"--mock-data --vocab-size {VOCAB - 1} --num-layers 3 --hidden-size 32 --seq-length {SEQ} "
    f"--num-attention-heads 4 --global-batch-size {SAMPLES} --micro-batch-size 4 --train-iters 10 "
    "--lr 1e-2 --lr-decay-style constant --eval-iters 1 --device cpu --ffn-hidden-size 48"
)
FAMILIES = {
    "gpt2": "--normalization LayerNorm --position-embedding-type learned_absolute",
    "llama": "--normalization RMSNorm --position-embedding-type rope --swiglu "
    "--disable-bias-linear --group-query-attention --num-query-groups 2 "
    "--untie-embeddings-and-output-weights",
    "qwen": "--normalization RMSNorm --position-embedding-type rope --swiglu "
    "--disable-bias-linear --add-qkv-bias --group-query-attention --num-query-groups 1",
}


def dense_run(flags: str) -> Run:
    """Build a dense run of one rank, all its weights moved off what they are initialised to."""
    config = parse_args(f"{BASE} {flags}".split(), world_size=1)
    world = World(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        pg_collection=ProcessGroupCollection.create(config.model.layout(1)),
    )
    run = setup_run(config, world, tiny_model, plain_forward_step)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in unwrap(run.model).parameters():
            spread = 0.2 if param.dim() == 1 else 0.1
            param += spread * torch.randn(param.shape, generator=generator).to(param.dtype)
    run.optimizer.after_load(with_optim=False)
    return run


def save_dense(folder: Path, flags: str) -> None:
    """Save such a run as of iteration 3, moments and random states too."""
    save(folder, dense_run(flags), 3)
