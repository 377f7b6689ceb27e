"""The layout oracle: train a few steps on some ranks and keep everything, in global names.

Goes through the launcher's own model and forward step and the real ``train_step``, so that what
is compared with one process is what users run. Samples are a function of their number alone.
"""

import dataclasses
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.gpt import gpt_layer_specs, gpt_model  # noqa: F401  before the fork: slow
from megatron.core.param_role import role_of
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.config.run_config import RunConfig
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World
from megatron.training.run import Run, TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import train_step
from pretrain_gpt import forward_step, model_provider
from tests.helpers.ranks import run_ranks
from tests.helpers.whole_tensors import unsharded, whole_tensors

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
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_train, world_size, Path(folder), steps, batch_of or make_batch, options)
        ranks = [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)
        ]
    records = [
        StepRecord(
            _same(rank["losses"][i] for rank in ranks),
            _same(rank["norms"][i] for rank in ranks),
            _union(rank["gradients"][i] for rank in ranks),
            _union(rank["weights"][i] for rank in ranks),
        )
        for i in range(steps)
    ]
    counts = ranks[0]["counts"]
    assert all(torch.equal(rank["counts"], counts) for rank in ranks)
    return LayoutResult(_union(rank["initial"] for rank in ranks), records, counts)


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


def make_batch(sample_ids: range) -> Batch:
    """Make samples from their numbers: uneven masks, and sample 3 of each 8 wholly masked."""
    tokens, masks = [], []
    for number in sample_ids:
        generator = torch.Generator().manual_seed(number)
        tokens.append(torch.randint(VOCAB, (SEQ + 1,), generator=generator))
        masks.append((torch.rand(SEQ, generator=generator) < 0.2 + 0.1 * (number % 8)).float())
        if number % 8 == 3:
            masks[-1].zero_()
    ids = torch.stack(tokens)
    return Batch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.stack(masks),
        position_ids=torch.arange(SEQ).expand(len(tokens), SEQ).contiguous(),
        attention_mask=None,
        sample_ids=tuple(sample_ids),
    )


def global_tensors(run: Run, of: str = "") -> dict[str, Tensor]:
    """Return this rank's parameters, or their attribute ``of``, by global name; slices made whole.

    Every rank must call this.
    """
    found: dict[str, Tensor] = {}
    for name, param in run.model.trainable_parameters():
        tensor = unsharded(getattr(param, of) if of else param.detach())
        found |= whole_tensors(name, tensor, role_of(param), run.world.pg_collection)
    return found


def _biases(run: Run) -> dict[str, Tensor]:
    found = run.model.module.named_buffers()
    return {name: bias.clone() for name, bias in found if name.endswith(("expert_bias", "qb_beta"))}


def _train(
    folder: Path, steps: int, batch_of: Callable[[range], Batch], options: dict[str, Any]
) -> None:
    config = make_config(**options)
    run = make_run(config)
    state = TrainState(dropout_seed=config.training.seed)
    kept: dict[str, Any] = {"initial": global_tensors(run)}
    kept |= {"losses": [], "norms": [], "gradients": [], "weights": []}
    for _ in range(steps):
        outcome = train_step(run, state, microbatches(run, state.consumed_samples, batch_of))
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
        kept["losses"].append(outcome.lm_loss)
        kept["norms"].append(outcome.grad_norm)
        whole = not config.ddp.use_distributed_optimizer  # else a rank has sums of its slices only
        kept["gradients"].append(global_tensors(run, "main_grad") if whole else {})
        kept["weights"].append(global_tensors(run) | _biases(run))
    kept["counts"] = torch.zeros(0)
    if run.moe_metrics is not None:
        kept["counts"] = run.moe_metrics.report(run.world.pg_collection).tokens_per_expert
    torch.save(kept, folder / f"{dist.get_rank()}.pt")


def _same(values: Iterator[float]) -> float:
    found = set(values)
    assert len(found) == 1, f"ranks disagree: {found}"
    return found.pop()


def _union(ranks: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for tensors in ranks:
        for key, tensor in tensors.items():
            assert torch.equal(merged.setdefault(key, tensor), tensor), f"replicas of {key} differ"
    return merged
