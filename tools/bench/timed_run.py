"""A run as ``pretrain`` builds it, on made-up tokens, whose steps tell how long their parts took.

Every step has new tokens, so new routing. Of a batch only the number of its samples matters: all
layouts of a model train on the same ones.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World
from megatron.training.run import Run, TrainState
from megatron.training.setup_model import build_moe_metrics, build_pipeline, setup_run
from megatron.training.setup_model import microbatches as microbatches_of
from megatron.training.train_step import train_step
from pretrain_gpt import forward_step, model_provider
from tools.layouts.oracle import make_config, microbatches

PARTS = ("zero", "forward_backward", "reduce", "optimizer")
"""Parts of a step: zeroing of gradients, all microbatches, what is left of sums over ranks, and
norm, clipping, update and new weights of the model. What none of them is, is "rest"."""

Clock = Callable[[], float]


def busy_clock() -> float:
    """Return seconds: processor time of one thread; of several, or with CUDA, those of the clock.

    On CUDA it waits until the device is done.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def options_of(
    *, hidden: int, layers: int, sequence: int, experts: int, vocabulary: int, bf16: bool
) -> dict[str, Any]:
    """Return options of a model shaped like bench-S: heads of 64, ffn 2 x hidden, top-2, AdamW."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": max(2, hidden // 64),
        "ffn_hidden_size": 2 * hidden,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "num_moe_experts": experts,
        "moe_aux_loss_coeff": [0.01],
        "moe_z_loss_coeff": None,
        "init_method_std": 0.02,
        "seq_length": sequence,
        "max_position_embeddings": sequence,
        "padded_vocab_size": vocabulary,
        "lr": 3e-4,
        "clip_grad": 1.0,
        "fp64": False,
        "bf16": bf16,
        "train_iters": 1000,
        "lr_decay_iters": 1000,
    }


class TimedRun:
    """A model of some options on the ranks of the default group, and its steps."""

    def __init__(self, options: Mapping[str, Any], *, clock: Clock = busy_clock) -> None:
        """Build it as ``pretrain`` does.

        Args:
            options: As of ``tools.layouts.oracle.make_config``.
            clock: Returns seconds.
        """
        self.config = make_config(**options)
        groups = ProcessGroupCollection.create(self.config.model.layout(dist.get_world_size()))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        world = World(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            pg_collection=groups,
        )
        self.run: Run = setup_run(self.config, world, model_provider, forward_step)
        self.state = TrainState(dropout_seed=1)
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._watch(self.run.model, "zero_grad_buffer", "zero")
        self._watch(self.run.pipeline, "forward_backward", "forward_backward")
        self._watch(self.run.model, "finish_grad_sync", "reduce")
        self._watch(self.run.optimizer, "step", "optimizer")

    @property
    def num_parameters(self) -> int:
        """Numbers trained on this rank."""
        return sum(param.numel() for _, param in self.run.model.trainable_parameters())

    def set_global_batch(self, samples: int) -> None:
        """Let steps have ``samples`` over all ranks, in microbatches of the same size."""
        if samples == self.run.global_batch_size:
            return
        world, training = self.run.world, self.config.training
        self.config = dataclasses.replace(
            self.config, training=dataclasses.replace(training, global_batch_size=samples)
        )
        count = microbatches_of(self.config, world).count
        self.run = dataclasses.replace(
            self.run,
            config=self.config,
            num_microbatches=count,
            pipeline=build_pipeline(self.config, world, count),
            moe_metrics=build_moe_metrics(self.config, world, count),
        )
        self._watch(self.run.pipeline, "forward_backward", "forward_backward")

    def step(self) -> dict[str, float]:
        """Train one step; return the seconds of its PARTS, of the "rest" and of the "step"."""
        vocabulary, length = self.run.padded_vocab_size, self.run.seq_length
        data = list(
            microbatches(
                self.run,
                self.state.consumed_samples,
                lambda samples: random_batch(samples, vocabulary, length),
            )
        )
        self._seconds = dict.fromkeys(PARTS, 0.0)
        start = self._clock()
        outcome = train_step(self.run, self.state, iter(data))
        whole = self._clock() - start
        assert outcome.updated, "the step was skipped"
        self.state.iteration += 1
        self.state.consumed_samples += self.run.global_batch_size
        rest = whole - sum(self._seconds.values())
        return self._seconds | {"rest": rest, "step": whole}

    def _watch(self, owner: Any, name: str, part: str) -> None:
        """Add the seconds of the method ``name`` of ``owner`` to those of ``part``."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            result = original(*args, **kwargs)
            self._seconds[part] += self._clock() - start
            return result

        setattr(owner, name, timed)


def random_batch(sample_ids: range, vocabulary: int, length: int) -> Batch:
    """Make samples of random tokens from their numbers, all of which count in the loss."""
    ids = torch.stack(list(_samples(sample_ids, vocabulary, length + 1)))
    return Batch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(len(ids), length),
        position_ids=torch.arange(length).expand(len(ids), length).contiguous(),
        attention_mask=None,
        sample_ids=tuple(sample_ids),
    )


def _samples(sample_ids: range, vocabulary: int, length: int) -> Iterator[torch.Tensor]:
    for number in sample_ids:
        generator = torch.Generator().manual_seed(number)
        yield torch.randint(vocabulary, (length,), generator=generator)
