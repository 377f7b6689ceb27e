"""A two-layer MoE run in fp64 on the ranks of a test, with batches made by hand."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch._dynamo  # every optimizer imports it, for over a second: once, before the fork
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.gpt import moe_module_specs  # noqa: F401  (before the fork)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.param_role import logical_tensors, role_of
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args
from megatron.training.batch import get_batch
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World
from megatron.training.loss import masked_loss
from megatron.training.run import Run, TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import train_step

VOCAB, SEQ, SAMPLES = 128, 16, 8
FLAGS = (
    f"--mock-data --vocab-size {VOCAB - 1} --num-layers 2 --hidden-size 32 "
    "--num-attention-heads 2 --num-experts 4 --moe-aux-loss-coeff 0 --moe-z-loss-coeff 1e-2 "
    f"--seq-length {SEQ} --global-batch-size {SAMPLES} --train-iters 10 --lr 1e-2 "
    "--lr-decay-style constant --eval-iters 1 --fp64 --device cpu"
)


def tiny_run(extra: str = "", forward_step: Callable | None = None) -> Run:
    """Build the run on the ranks that are there."""
    world_size = dist.get_world_size()
    config = parse_args(f"{FLAGS} {extra}".split(), world_size=world_size)
    world = World(
        rank=dist.get_rank(),
        world_size=world_size,
        device=torch.device("cpu"),
        pg_collection=ProcessGroupCollection.create(config.model.layout(world_size)),
    )
    return setup_run(config, world, tiny_model, forward_step or plain_forward_step)


def tiny_model(config, pg_collection):
    return GPTModel(
        config.model,
        get_gpt_decoder_block_spec(config.model),
        vocab_size=config.tokenizer.padded_vocab_size,
        max_sequence_length=SEQ,
        pg_collection=pg_collection,
    )


def plain_forward_step(data_iterator, model):
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, partial(lambda mask, out: masked_loss(out, mask), loss_mask)


def masks(seed: int = 0) -> Tensor:
    """[samples, s]: uneven on purpose; one sample does not count at all."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.0, 1.0, SAMPLES).view(-1, 1)
    return (torch.rand(SAMPLES, SEQ, generator=generator) < share).float()


def tiny_batches(run: Run, mask: Tensor | None = None) -> Iterator[Batch]:
    """Yield the microbatches of this rank from one fixed global batch, again and again."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, VOCAB - 1, (SAMPLES, SEQ + 1), generator=generator)
    mask = masks() if mask is None else mask
    mbs = run.config.training.micro_batch_size
    dp = run.world.pg_collection.dp
    while True:
        for first in range(dp.rank() * mbs, SAMPLES, dp.size() * mbs):
            yield _batch(text, mask, range(first, first + mbs))


def _batch(text: Tensor, mask: Tensor, numbers: Sequence[int]) -> Batch:
    rows = text[list(numbers)]
    return Batch(
        tokens=rows[:, :-1],
        labels=rows[:, 1:],
        loss_mask=mask[list(numbers)],
        position_ids=torch.arange(SEQ).expand(len(numbers), SEQ),
        attention_mask=None,
        sample_ids=tuple(numbers),
    )


def skipped_step(extra: str, spoil: float) -> Run:
    """Return a run after a step that was not made: rank 0 multiplies a gradient by ``spoil``."""

    def forward_step(data_iterator, model):
        output, loss_func = plain_forward_step(data_iterator, model)
        if dist.get_rank() == 0:
            output.register_hook(lambda grad: grad * spoil)
        return output, loss_func

    run = tiny_run(extra, forward_step)
    assert not train_step(run, TrainState(), tiny_batches(run)).updated
    return run


def gradients(run: Run) -> dict[str, Tensor]:
    """Return global name -> gradient of every logical tensor of this rank."""
    return {
        key: piece.clone()
        for name, param in run.model.trainable_parameters()
        for key, piece in logical_tensors(name, param.main_grad, role_of(param))
    }


def weights(run: Run) -> dict[str, Tensor]:
    """Return global name -> weight of every parameter of this rank."""
    return {name: p.detach().clone() for name, p in run.model.trainable_parameters()}
