"""What this project computes for a checkpoint that came from Hugging Face, on one rank or several.

Goes the way of a user: options by `--use-checkpoint-args`, weights by `--load`, a training step by
`train_step`. Gradients come back under the names of the checkpoint, by the plan of its weights.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.huggingface.exchange import hf_tensor
from megatron.core.models.huggingface.weight_plan import WeightPlan
from megatron.core.param_role import GATED_PARTS
from megatron.core.transformer.forward_context import ForwardContext
from megatron.training.arguments import parse_args
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.config.run_config import RunConfig
from megatron.training.datasets.batch import Batch
from megatron.training.run import Run, TrainState
from megatron.training.train_step import next_batches
from tests.helpers.hf_cases import SAMPLES, SEQ, VOCAB
from tests.helpers.hf_models import Reference, batch
from tools.layouts.oracle import RankRecord, make_run, merged, microbatches, record_steps
from tools.layouts.ranks import run_ranks

_WORDS = f"""
    --use-checkpoint-args --finetune --mock-data --tokenizer-type NullTokenizer
    --vocab-size {VOCAB - 1} --seq-length {SEQ} --micro-batch-size 1 --global-batch-size {SAMPLES}
    --train-iters 4 --lr 0.01 --lr-decay-style constant --clip-grad 0
    --hidden-dropout 0 --attention-dropout 0
"""
_SPARSE = "--moe-router-load-balancing-type none"


class Layout(NamedTuple):
    """A number of ranks, and the flags that share the model out to them."""

    ranks: int = 1
    words: str = ""


class Ours(NamedTuple):
    """What a layout computes; see Reference."""

    result: Reference
    grad_norm: float
    """Of all gradients, as the step told it."""


def run_config(
    folder: Path, layout: Layout, dtype: torch.dtype, *, is_sparse: bool, rows: int
) -> RunConfig:
    """Return the options of a run that begins with a folder, a checkpoint of ours or of theirs.

    Its vocabulary is padded to ``rows``.
    """
    words = [*_WORDS.split(), "--load", str(folder), *layout.words.split()]
    words += ["--padded-vocab-size", str(rows)]
    words += ["--fp64"] if dtype == torch.float64 else []
    words += _SPARSE.split() if is_sparse else []
    return parse_args(words, world_size=layout.ranks)


def compute(configs: Sequence[RunConfig], ranks: int, plan: WeightPlan) -> list[Ours]:
    """Load, run forward and one training step with each configuration, on forked ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        run_ranks(_load_and_step, ranks, configs, Path(scratch))
        return [_gathered(Path(scratch), number, ranks, plan) for number in range(len(configs))]


def train_and_save(config: RunConfig, ranks: int, folder: Path) -> Tensor:
    """Load, make a step, save into ``folder``; return the logits of the model that is saved."""
    with tempfile.TemporaryDirectory() as scratch:
        run_ranks(_step_and_save, ranks, config, folder, Path(scratch))
        found: dict[int, Tensor] = {}
        for rank in range(ranks):
            found |= torch.load(Path(scratch) / f"{rank}.pt", weights_only=True)
    return _in_order(found)


def in_their_names(tensors: Mapping[str, Tensor], plan: WeightPlan) -> dict[str, Tensor]:
    """Return tensors like ours (weights, gradients) as the checkpoint names and shapes them."""
    dtype = next(iter(tensors.values())).dtype
    tensors = dict(_in_parts(tensors, plan))
    stored = [key for key in plan.hf_shapes if _is_made_of(plan, key, tensors)]
    return {key: hf_tensor(plan, key, dtype, tensors.__getitem__) for key in stored}


def _in_parts(tensors: Mapping[str, Tensor], plan: WeightPlan) -> Iterator[tuple[str, Tensor]]:
    """Cut what lies in one parameter here and is two tensors of a checkpoint: gate and up."""
    for name, tensor in tensors.items():
        head, _, tail = name.rpartition(".")
        if name in plan.shapes:
            yield name, tensor
        else:
            for part, half in zip(GATED_PARTS, tensor.chunk(2), strict=True):
                yield f"{head}.{part}.{tail}", half


def _is_made_of(plan: WeightPlan, hf_key: str, tensors: Mapping[str, Tensor]) -> bool:
    return all(piece.key in tensors for piece in plan.pieces_of_hf_key[hf_key])


def _gathered(scratch: Path, number: int, ranks: int, plan: WeightPlan) -> Ours:
    found = [
        torch.load(scratch / f"{number}.{rank}.pt", weights_only=False) for rank in range(ranks)
    ]
    records: list[RankRecord] = [record for record, _ in found]
    logits: dict[int, Tensor] = {}
    for _, of_rank in found:
        logits |= of_rank
    (step,) = merged(records).steps
    gradients = in_their_names(step.gradients, plan)
    return Ours(Reference(_in_order(logits), step.lm_loss, gradients), step.grad_norm)


def _in_order(logits: Mapping[int, Tensor]) -> Tensor:
    """Return [samples, s, v], without the columns that pad the vocabulary."""
    return torch.cat([logits[sample] for sample in range(SAMPLES)])[..., :VOCAB]


def _loaded(config: RunConfig) -> Run:
    run = make_run(config)
    load_checkpoint(config.checkpoint.load, config=config, model=run.model, optimizer=run.optimizer)
    return run


def _step_and_save(config: RunConfig, folder: Path, scratch: Path) -> None:
    run = _loaded(config)
    record_steps(run, 1, _samples)
    torch.save(_logits(run), scratch / f"{dist.get_rank()}.pt")
    saved = save_checkpoint(
        folder,
        TrainState(iteration=1, consumed_samples=SAMPLES),
        config=config,
        model=run.model,
        optimizer=run.optimizer,
    )
    assert not saved.error, saved.error


def _load_and_step(configs: Sequence[RunConfig], scratch: Path) -> None:
    for number, config in enumerate(configs):
        run = _loaded(config)
        logits = _logits(run)
        record = record_steps(run, 1, _samples)
        torch.save((record, logits), scratch / f"{number}.{dist.get_rank()}.pt")


@torch.no_grad()
def _logits(run: Run) -> dict[int, Tensor]:
    """Return sample -> logits [1, s, v], on the ranks that have the last stage."""
    batches = next_batches(run, microbatches(run, 0, _samples))
    found: dict[int, Tensor] = {}

    def forward(index: int, chunk: int, pipeline_input: Tensor | None) -> Tensor:
        own = batches[index]
        context = ForwardContext(chunk=chunk, pipeline_input=pipeline_input)
        output: Tensor = run.model(own.tokens, own.position_ids, context=context)
        if run.pipeline.has_loss(chunk):
            found[own.sample_ids[0]] = output
        return output

    run.model.eval()
    run.pipeline.forward_only(forward)
    run.model.train()
    return found


def _samples(numbers: range) -> Batch:
    tokens, labels, mask = batch()
    own = list(numbers)
    return Batch(
        tokens=tokens[own],
        labels=labels[own],
        loss_mask=mask[own],
        position_ids=torch.arange(SEQ).expand(len(own), SEQ).contiguous(),
        attention_mask=None,
        sample_ids=tuple(own),
    )
