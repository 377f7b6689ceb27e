"""Overlap in whole training steps of a small GPT with experts, over a slow link.

One case sleeps for its computation, as those of ``overlap_cases.py`` do; the other really computes,
so its figures are of the machine and of what else runs on it.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.datasets.batch import Batch
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from tools.bench.overlap_cases import BOTH, Case, Times, pausing
from tools.bench.slow_group import LINK
from tools.layouts.oracle import make_config, make_run, microbatches

VOCABULARY = 64
EVERYTHING = {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "moe_shared_expert_overlap": True,
}
BUSY = 0.5  # share of the time of computation that the link is busy, where it is chosen here


class _Model:
    """A run of a small GPT and its steps."""

    def __init__(self, seconds: float, sequence: int, **options: Any) -> None:
        """Build it.

        Args:
            seconds: How long each attention, and all experts of a layer, sleep; 0 for not at all.
            sequence: Tokens of a sample.
            options: Beside those that all cases have.
        """
        shape = {"seq_length": sequence, "max_position_embeddings": sequence}
        common = {"fp64": False, "global_batch_size": 8, "expert_model_parallel_size": 2}
        self.run = make_run(make_config(**(common | shape | options)))
        self.state = TrainState(dropout_seed=1)
        self._batch_of = _batches(sequence)
        for number, layer in enumerate(_layers(self.run.model) if seconds else ()):
            for what, part in (("attention", layer.self_attention), ("experts", layer.mlp.experts)):
                part.register_forward_hook(pausing(f"{what} {number}", seconds))

    def step(self) -> None:
        data = microbatches(self.run, self.state.consumed_samples, self._batch_of)
        outcome = train_step(self.run, self.state, data)
        assert outcome.updated, "the step was skipped"
        self.state.iteration += 1
        self.state.consumed_samples += self.run.global_batch_size

    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for _, param in self.run.model.trainable_parameters()]


def _layers(model: torch.nn.Module) -> Iterator[TransformerLayer]:
    return (module for module in model.modules() if isinstance(module, TransformerLayer))


def _batches(sequence: int) -> Callable[[range], Batch]:
    def batch_of(sample_ids: range) -> Batch:
        rngs = [torch.Generator().manual_seed(number) for number in sample_ids]
        ids = torch.stack([torch.randint(VOCABULARY, (sequence + 1,), generator=r) for r in rngs])
        positions = torch.arange(sequence).expand(len(ids), sequence)
        return Batch(
            tokens=ids[:, :-1].contiguous(),
            labels=ids[:, 1:].contiguous(),
            loss_mask=torch.ones(len(ids), sequence),
            position_ids=positions.contiguous(),
            attention_mask=None,
            sample_ids=tuple(sample_ids),
        )

    return batch_of


def other_microbatch(times: Times) -> Case:
    """``--overlap-moe-expert-parallel-comm``: rows of one microbatch under another one."""
    sequence, width, microbatch = 16, 16, 1
    runs = {
        on: _Model(
            times.compute,
            sequence,
            micro_batch_size=microbatch,
            overlap_moe_expert_parallel_comm=on,
            **({"hidden_size": width, "num_layers": 2}),
        )
        for on in BOTH
    }
    rows_bytes = 4 * sequence * microbatch * 2 * width  # top-2, fp32
    return Case(
        step=lambda on: runs[on].step(),
        result=lambda on: runs[on].weights(),
        seconds_per_byte={"all_to_all": times.transfer / rows_bytes},
    )


def everything(*, hidden_size: int = 128, sequence: int = 128) -> Case:
    """Return a case of all three at once: reduction, gather and shared experts; real computation.

    The link is as fast as makes it busy for a share ``BUSY`` of the time of computation.
    """
    shape = {
        "hidden_size": hidden_size,
        "num_attention_heads": 4,
        "ffn_hidden_size": 2 * hidden_size,
        "moe_shared_expert_intermediate_size": 2 * hidden_size,
        "num_layers": 4,
        "bucket_size": 4 * hidden_size * hidden_size,
        "use_distributed_optimizer": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    runs = {on: _Model(0.0, sequence, **shape, **(EVERYTHING if on else {})) for on in BOTH}
    for model in runs.values():
        model.step()
    LINK.events.clear()
    dist.barrier()
    start = time.perf_counter()
    for model in runs.values():
        model.step()
    seconds = torch.tensor((time.perf_counter() - start) / 2, dtype=torch.float64)
    sent = sum(event.size_bytes for event in LINK.events if event.what == "launch") / 2
    dist.broadcast(seconds, src=0)
    rate = BUSY * float(seconds) / sent
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    return Case(
        step=lambda on: runs[on].step(),
        result=lambda on: runs[on].weights(),
        seconds_per_byte=dict.fromkeys(kinds, rate),
    )
