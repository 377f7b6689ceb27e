"""A folder of Hugging Face's straight into a model on ranks: each reads the tensors it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import attempt, gather
from megatron.core.dist_checkpointing.mapping import MODEL, model_tensors
from megatron.core.dist_checkpointing.offline import box
from megatron.core.dist_checkpointing.tensor_shards import Storable, TensorShards
from megatron.core.distributed.data_parallel_base import is_fully_sharded
from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.models.huggingface import accounting
from megatron.core.models.huggingface.exchange import our_tensor
from megatron.core.models.huggingface.family import family_of
from megatron.core.models.huggingface.folder import HfFolder
from megatron.core.models.huggingface.options import model_options
from megatron.core.models.huggingface.quantized import PlainNumbers
from megatron.core.models.huggingface.weight_plan import WeightPlan, weight_plan
from megatron.core.transformer.precision import params_dtype
from megatron.training.checkpoint_state import LoadedState, SavedOptimizer
from megatron.training.checkpointing import kept_weights, padded_vocab_size, unwrap
from megatron.training.config.run_config import RunConfig
from megatron.training.huggingface_family import NUMBER_FORMAT
from megatron.training.resume_rules import architecture, architecture_problems
from megatron.training.starting_point import StartingPoint


def load_huggingface(
    start: StartingPoint,
    config: RunConfig,
    model: nn.Module,
    optimizer: SavedOptimizer | None,
    group: ProcessGroup | None,
) -> LoadedState:
    """Begin a run with a folder; see ``load_checkpoint``."""
    assert isinstance(start.folder, Path), f"{start.folder} is in an object store"
    weights = kept_weights(model)
    sizes = gather(padded_vocab_size(unwrap(model)), group)
    notices = load_folder(
        start.folder,
        model_tensors(unwrap(model), weights),
        config=config,
        rows=next(filter(None, sizes)),
        group=group,
    )
    if is_fully_sharded(model):
        model.take_weights(weights or ())
    if optimizer is not None:
        optimizer.after_load(with_optim=False)
    return LoadedState(
        iteration=0,
        consumed_train_samples=0,
        dropout_seed=config.training.seed,
        path=start.folder,
        notices=tuple(notices),
    )


def load_folder(
    folder: Path,
    tensors: Mapping[str, Storable],
    *,
    config: RunConfig,
    rows: int,
    group: ProcessGroup | None,
) -> list[str]:
    """Fill the tensors of a model from a folder; on every rank of ``group``.

    Args:
        folder: Has config.json and weights in safetensors.
        tensors: ``model_tensors`` of this rank; written in place.
        config: Of this run; must be the model of config.json.
        rows: Rows of this run's embedding.
        group: The ranks that hold the model together; None for one process.

    Returns:
        Notices for the log.

    Raises:
        ConfigError: config.json cannot be built.
        CheckpointError: Another model, or tensors that are missing, too many or damaged; the same
            on all ranks. Nothing was read then, unless reading itself failed.
    """
    plan, names = attempt(lambda: _checked(folder, config, rows), group)
    attempt(lambda: _refuse_strangers(plan, tensors), group)
    _refuse_gaps(plan, tensors, group)
    dtype = params_dtype(config.model)
    attempt(lambda: _read(folder, plan, names, tensors, dtype), group)
    return [*_left_out(folder, names.ignored), *_notices(folder, config)]


def _left_out(folder: Path, ignored: tuple[str, ...]) -> list[str]:
    if not ignored:
        return []
    more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
    return [f"{folder}: not of this model, and left out: {', '.join(ignored[:3])}{more}"]


def _checked(
    folder: Path, config: RunConfig, rows: int
) -> tuple[WeightPlan, accounting.Accounting]:
    with HfFolder.open(folder) as source:
        try:
            options = model_options(source.config, with_mtp=bool(config.model.mtp_num_layers))
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        _refuse_other_model(folder, options, config)
        theirs = options["padded_vocab_size"]
        if rows < theirs:
            raise CheckpointError(
                f"{folder} has a vocabulary of {theirs} rows and this run pads its own to "
                f"{rows}: --padded-vocab-size {theirs} (or more) takes them all"
            )
        options["padded_vocab_size"] = rows
        plan = weight_plan(family_of(source.config), options, vocab_size=theirs)
        numbers = PlainNumbers(source, params_dtype(config.model))
        found = {key: fact.shape for key, fact in numbers.facts.items()}
        accounted = accounting.account(plan, found)
        accounting.refuse_other_copies(folder, numbers, accounted)
        return plan, accounted


def _refuse_other_model(folder: Path, options: Mapping[str, Any], config: RunConfig) -> None:
    theirs = architecture(RunConfig.from_flat(options).model)
    ours = architecture(config.model)
    theirs[NUMBER_FORMAT] = ours[NUMBER_FORMAT]  # numbers are rounded to this run's
    problems = list(architecture_problems(theirs, ours))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckpointError(
            f"{folder} does not fit this run (--use-checkpoint-args takes what config.json "
            f"says):{listed}"
        )


def _refuse_strangers(plan: WeightPlan, tensors: Mapping[str, Storable]) -> None:
    shapes = {key.removeprefix(MODEL): tuple(tensor.shape) for key, tensor in tensors.items()}
    missing = plan.shapes.keys() - shapes.keys()  # on other ranks, perhaps
    accounting.compare_with_model(plan, shapes | {key: plan.shapes[key] for key in missing})


def _refuse_gaps(
    plan: WeightPlan, tensors: Mapping[str, Storable], group: ProcessGroup | None
) -> None:
    """Refuse tensors on disk that no rank wants."""
    mine = 0
    for number, key in enumerate(plan.shapes):
        mine |= (MODEL + key in tensors) << number
    wanted = 0
    for held in gather(mine, group):
        wanted |= held
    unread = [key for number, key in enumerate(plan.shapes) if not wanted >> number & 1]
    accounting.refuse(
        f"the model does not fit the family {plan.family.name}",
        [f"no rank holds {key}" for key in unread],
    )


def _read(
    folder: Path,
    plan: WeightPlan,
    names: accounting.Accounting,
    tensors: Mapping[str, Storable],
    dtype: torch.dtype,
) -> None:
    with HfFolder.open(folder) as source, torch.no_grad():
        read = accounting.named_reader(PlainNumbers(source, dtype), names)
        for key, target in tensors.items():
            made = our_tensor(plan, key.removeprefix(MODEL), target.dtype, read)
            fill(target, made)


def fill(target: Storable, whole: Tensor) -> None:
    """Copy a whole tensor, or this rank's blocks of it."""
    if not isinstance(target, TensorShards):
        target.copy_(whole)
        return
    for shard in target.shards:
        shard.tensor.copy_(whole[box(shard.offset, tuple(shard.tensor.shape))])


def _notices(folder: Path, config: RunConfig) -> list[str]:
    from megatron.training.huggingface_start import facts_of_folder

    stored = facts_of_folder(folder)["config"]["model"]
    kinds = [name for name in ("bf16", "fp16", "fp64") if stored[name]] or ["fp32"]
    now = [name for name in ("bf16", "fp16", "fp64") if getattr(config.model, name)] or ["fp32"]
    if kinds == now:
        return []
    return [f"{folder} is in {kinds[0]} and this run in {now[0]}: weights are converted"]
