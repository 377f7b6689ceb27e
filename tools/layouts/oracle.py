"""The layout oracle: train a few steps on some ranks and keep everything, in global names.

Goes through the launcher's own model and forward step and the real ``train_step``, so that what
is compared with one process is what users run. Samples are a function of their number alone.
"""

import dataclasses
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.collectives import all_gather_single
from megatron.core.distributed.data_parallel_base import DataParallelBase
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel import (
    TorchFullyShardedDataParallel,
)
from megatron.core.models.gpt import gpt_layer_specs, gpt_model  # noqa: F401  before the fork: slow
from megatron.core.param_role import LogicalShard, logical_shards, role_of
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_report import MoEReport
from megatron.training.config.run_config import RunConfig
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World
from megatron.training.run import Run, TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import train_step
from pretrain_gpt import forward_step, model_provider
from tools.layouts.ranks import run_ranks
from tools.layouts.sharded_blocks import sharded_gradients, sharded_weights
from tools.layouts.trace import Piece, Tracer
from tools.layouts.whole_tensors import Blocks, whole_of_ranks, whole_tensors

VOCAB, SEQ = 64, 12
DEFAULTS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 24,
    "swiglu": True,
    "fp64": True,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "max_position_embeddings": SEQ,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": [0.02],
    "moe_z_loss_coeff": 1e-3,
    "init_method_std": 0.2,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 4,
    "lr": 0.05,
    "lr_decay_style": "constant",
    "lr_decay_iters": 4,
    "clip_grad": 0.0,
    "seq_length": SEQ,
    "padded_vocab_size": VOCAB,
}


class StepRecord(NamedTuple):
    """What one optimizer step left behind, in global names."""

    lm_loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class LayoutResult(NamedTuple):
    """A short run on one layout."""

    initial: dict[str, Tensor]
    """Global name -> weight before the first step."""
    steps: list[StepRecord]
    tokens_per_expert: Tensor
    """[moe layers, experts], over all steps."""
    metrics: dict[str, float]
    """Figures of the MoE layers, ``<layer>/<name>``, over all steps; and the losses of multi-token
    prediction, ``step <step>/mtp_<depth>_loss``."""


@dataclass
class RankRecord:
    """What one rank kept of a short run: blocks of tensors, and what all ranks must agree on."""

    initial: Blocks
    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    gradients: list[Blocks] = field(default_factory=list)
    weights: list[Blocks] = field(default_factory=list)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0))
    metrics: dict[str, float] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    """What flowed through the model, if that was asked for."""


def make_config(**options: Any) -> RunConfig:
    """Build a resolved RunConfig from option names, whichever section they are in."""
    values = DEFAULTS | options
    hints = typing.get_type_hints(RunConfig)
    sections, used = {}, set()
    for name, kind in hints.items():
        if dataclasses.is_dataclass(kind):
            known = {f.name for f in dataclasses.fields(kind)} & values.keys()
            sections[name] = kind(**{key: values[key] for key in known})
            used |= known
    assert used == values.keys(), f"no such option: {values.keys() - used}"
    return RunConfig(**sections)


def run_layout(
    world_size: int,
    *,
    steps: int = 2,
    batch_of: Callable[[range], Batch] | None = None,
    **options: Any,
) -> LayoutResult:
    """Train ``steps`` steps on ``world_size`` ranks and return what every rank agrees on.

    ``batch_of`` makes a microbatch of sample numbers, ``make_batch`` when not given. Fails when
    ranks that hold the same tensor do not hold the same bits.
    """
    return run_config(make_config(**options), world_size, steps=steps, batch_of=batch_of)


def run_config(
    config: RunConfig,
    world_size: int,
    *,
    steps: int = 2,
    batch_of: Callable[[range], Batch] | None = None,
) -> LayoutResult:
    """Do as ``run_layout`` with a resolved configuration."""
    (records,) = train_on_ranks([config], world_size, steps=steps, batch_of=batch_of)
    return merged(records)


def train_on_ranks(
    configs: Sequence[RunConfig],
    world_size: int,
    *,
    steps: int,
    batch_of: Callable[[range], Batch] | None = None,
    is_traced: bool = False,
) -> list[list[RankRecord]]:
    """Train with each configuration in turn on forked ranks; return what each rank kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        run_ranks(_train, world_size, path, configs, steps, batch_of or make_batch, is_traced)
        return [
            [
                torch.load(path / f"{number}.{rank}.pt", weights_only=False)
                for rank in range(world_size)
            ]
            for number in range(len(configs))
        ]


def merged(ranks: Sequence[RankRecord]) -> LayoutResult:
    """Put the records of all ranks together.

    Raises:
        AssertionError: Ranks that hold the same tensor do not hold the same bits, or disagree on
            what all of them must know.
    """
    records = [
        StepRecord(
            _same(rank.losses[i] for rank in ranks),
            _same(rank.norms[i] for rank in ranks),
            whole_of_ranks(rank.gradients[i] for rank in ranks),
            whole_of_ranks(rank.weights[i] for rank in ranks),
        )
        for i in range(len(ranks[0].losses))
    ]
    counts, metrics = ranks[0].counts, ranks[0].metrics
    assert all(torch.equal(rank.counts, counts) for rank in ranks), "ranks disagree on counts"
    assert all(repr(rank.metrics) == repr(metrics) for rank in ranks), "ranks disagree on metrics"
    initial = whole_of_ranks(rank.initial for rank in ranks)
    return LayoutResult(initial, records, counts, metrics)


def make_run(config: RunConfig) -> Run:
    """Build the live objects of a run over the ranks of the default process group."""
    groups = ProcessGroupCollection.create(config.model.layout(dist.get_world_size()))
    world = World(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cpu"),
        pg_collection=groups,
    )
    return setup_run(config, world, model_provider, forward_step)


def microbatches(
    run: Run, consumed: int, batch_of: Callable[[range], Batch] | None = None
) -> Iterator[Batch]:
    """Yield this rank's microbatches of the step that begins at sample ``consumed``."""
    size, ranks = run.config.training.micro_batch_size, run.world.pg_collection.dp.size()
    mine = run.world.pg_collection.dp.rank()
    for index in range(run.num_microbatches):
        first = consumed + index * size * ranks + mine * size
        yield (batch_of or make_batch)(range(first, first + size))


def make_batch(sample_ids: range, *, vocab: int = VOCAB, length: int = SEQ) -> Batch:
    """Make samples from their numbers: uneven masks, and sample 3 of each 8 wholly masked."""
    tokens, masks = [], []
    for number in sample_ids:
        generator = torch.Generator().manual_seed(number)
        tokens.append(torch.randint(vocab, (length + 1,), generator=generator))
        masks.append((torch.rand(length, generator=generator) < 0.2 + 0.1 * (number % 8)).float())
        if number % 8 == 3:
            masks[-1].zero_()
    ids = torch.stack(tokens)
    return Batch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.stack(masks),
        position_ids=torch.arange(length).expand(len(tokens), length).contiguous(),
        attention_mask=None,
        sample_ids=tuple(sample_ids),
    )


def global_tensors(run: Run, of: str = "") -> dict[str, Tensor]:
    """Return this rank's parameters, or their attribute ``of``, by global name; slices made whole.

    Every rank must call this.
    """
    found: dict[str, Tensor] = {}
    for name, param in run.model.trainable_parameters():
        tensor = getattr(param, of) if of else param.detach()
        found |= whole_tensors(name, tensor, role_of(param), run.world.pg_collection)
    return found


def _weights(run: Run) -> Blocks:
    """Return copies of this rank's parameters and expert biases."""
    if isinstance(run.model, TorchFullyShardedDataParallel):
        blocks = sharded_weights(run.model)
    else:
        blocks = _whole_weights(run.model)
    buffers = run.model.module.named_buffers()
    biases = {n: bias.clone() for n, bias in buffers if n.endswith(("expert_bias", "qb_beta"))}
    return [*blocks, *(LogicalShard(n, b, tuple(b.shape), (0,)) for n, b in biases.items())]


def _whole_weights(model: DataParallelBase) -> Blocks:
    named = [(n, p.detach().clone(), role_of(p)) for n, p in model.trainable_parameters()]
    return [block for one in named for block in logical_shards(*one)]


def _gradients(run: Run) -> Blocks:
    """Return copies of the summed gradients of this rank's parameters.

    Collective where each rank has the sums of its slices of the buffers only.
    """
    if isinstance(run.model, TorchFullyShardedDataParallel):
        return sharded_gradients(run.model)
    assert isinstance(run.model, DistributedDataParallel), f"{type(run.model)} has no buffers"
    params = list(run.model.trainable_parameters())
    found: dict[int, Blocks] = {}
    for number, buffer in enumerate(run.model.grad_buffers):
        flat = buffer.grad_data.clone()
        for bucket in run.model.bucket_layout.buckets:
            if buffer.is_sharded and bucket.buffer == number:
                own = flat[slice(*buffer.own(bucket.start, bucket.end))].clone()
                all_gather_single(flat[bucket.start : bucket.end], own, group=buffer.group)
        for span, view in buffer.views(flat):
            name, param = params[span.param]
            found[span.param] = list(logical_shards(name, view, role_of(param)))
    return [block for number in sorted(found) for block in found[number]]


def _train(
    folder: Path,
    configs: Sequence[RunConfig],
    steps: int,
    batch_of: Callable[[range], Batch],
    is_traced: bool,
) -> None:
    for number, config in enumerate(configs):
        kept = record_steps(make_run(config), steps, batch_of, is_traced=is_traced)
        torch.save(kept, folder / f"{number}.{dist.get_rank()}.pt")


def record_steps(
    run: Run, steps: int, batch_of: Callable[[range], Batch], *, is_traced: bool = False
) -> RankRecord:
    """Make ``steps`` steps from the start; every rank must call this."""
    state = TrainState(dropout_seed=run.config.training.seed)
    tracer = Tracer(run) if is_traced else None
    kept, ahead = RankRecord(initial=_weights(run)), []
    for _ in range(steps):
        outcome = train_step(run, state, microbatches(run, state.consumed_samples, batch_of))
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
        kept.losses.append(outcome.lm_loss)
        kept.norms.append(outcome.grad_norm)
        ahead.append(outcome.mtp_losses)
        kept.gradients.append(_gradients(run))
        kept.weights.append(_weights(run))
        if tracer is not None:
            tracer.step = state.iteration
    if run.moe_metrics is not None:
        report = run.moe_metrics.report(run.world.pg_collection)
        kept.counts, kept.metrics = report.tokens_per_expert, _figures(report)
    kept.metrics |= {
        f"step {step}/mtp_{depth}_loss": loss
        for step, losses in enumerate(ahead)
        for depth, loss in enumerate(losses, start=1)
    }
    kept.pieces = list(tracer.pieces.values()) if tracer is not None else []
    return kept


def _figures(report: MoEReport) -> dict[str, float]:
    """Name what the MoE layers say of themselves and no layout may change."""
    return {
        f"{layer.layer}/{name}": value
        for layer in report.layers
        for name, value in (layer.scalars() | dict(layer.means)).items()
        if name != "ep_load_ratio"  # of the ranks of this layout
    }


def _same(values: Iterable[Any]) -> Any:
    found = set(values)
    assert len(found) == 1, f"ranks disagree: {found}"
    return found.pop()
