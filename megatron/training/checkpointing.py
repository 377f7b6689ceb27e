"""What a checkpoint of a run holds, and how a run goes on from one.

Files and atomicity are in megatron.core.dist_checkpointing; which differences between a run and
a checkpoint are refused is in resume_rules.py. Every rank calls these functions.
"""

import hashlib
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.dist_checkpointing.agreement import (
    attempt,
    broadcast,
    gather,
    rank_in,
    size_of,
)
from megatron.core.dist_checkpointing.folders import Place
from megatron.core.dist_checkpointing.mapping import (
    MODEL,
    OPTIMIZER,
    RNG,
    model_tensors,
    optimizer_tensors,
)
from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.dist_checkpointing.rng_state import capture_rng_state, restore_rng_state
from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    OpenCheckpoint,
    open_checkpoint,
    write_checkpoint,
)
from megatron.core.distributed.data_parallel_base import DataParallelBase, is_fully_sharded
from megatron.core.errors import CheckpointError
from megatron.core.param_blocks import ParamBlocks
from megatron.core.param_role import ParamRole, role_of
from megatron.training.checkpoint_misfits import refuse_misfits, softmax_notices
from megatron.training.checkpoint_state import (
    LoadedState,
    Retention,
    SavedOptimizer,
    SavedTokenizer,
    SaveResult,
    TrainState,
)
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import (
    architecture,
    changed_options,
    config_data,
    schedule,
)
from megatron.training.starting_point import StartingPoint, starting_point
from megatron.training.tokenizer_facts import (
    tokenizer_copies,
    tokenizer_facts,
)

_EMBEDDING = "embedding.word_embeddings.weight"
_KEEP_ALL = Retention()


def save_checkpoint(
    folder: str | Place,
    state: TrainState,
    *,
    config: RunConfig,
    model: nn.Module,
    optimizer: SavedOptimizer | None,
    tokenizer: SavedTokenizer | None = None,
    data_fingerprint: str | None = None,
) -> SaveResult:
    """Save a run; on every rank. A failure to write is returned, not raised.

    Args:
        folder: ``--save``; gets ``iter_0000010`` for iteration 10 and the tracker file.
        state: Where training stands.
        config: Of the run; saved whole. ``--no-save-optim``, ``--no-save-rng``, ``--keep-last``
            and ``--save-retain-interval`` are read from it.
        model: The model, or the DataParallelBase around it.
        optimizer: None when there is none (then its state is left out).
        tokenizer: Its fingerprint is saved and its files are copied; None with mock data.
        data_fingerprint: Of the training data and its order (``SampleDataset.fingerprint``).

    Returns:
        The same on every rank, but for ``seconds``.
    """
    content = checkpoint_content(
        state,
        config=config,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        data_fingerprint=data_fingerprint,
    )
    keep = Retention.of(config.checkpoint)
    return publish(place(folder), state.iteration, content, world_group(), keep)


def publish(
    folder: Place,
    iteration: int,
    content: CheckpointContent,
    group: ProcessGroup | None,
    keep: Retention = _KEEP_ALL,
    *,
    is_complete: bool = True,
) -> SaveResult:
    """Write ``content`` as the newest checkpoint; see ``write_checkpoint``.

    A failure to write is returned, not raised.
    """
    begin = time.perf_counter()
    try:
        path, size = write_checkpoint(
            folder,
            iteration,
            content,
            group,
            keep_last=keep.keep_last,
            retain_interval=keep.interval,
            is_complete=is_complete,
        )
    except CheckpointError as error:
        return SaveResult(iteration=iteration, path=None, error=str(error))
    seconds = time.perf_counter() - begin
    return SaveResult(iteration=iteration, path=path, size_bytes=size, seconds=seconds)


def checkpoint_content(
    state: TrainState,
    *,
    config: RunConfig,
    model: nn.Module,
    optimizer: SavedOptimizer | None,
    tokenizer: SavedTokenizer | None = None,
    data_fingerprint: str | None = None,
) -> CheckpointContent:
    """Return what a checkpoint of a run holds: views of what lives, good until the next step.

    For the arguments see ``save_checkpoint``.
    """
    group = world_group()
    tensors = model_tensors(unwrap(model), kept_weights(model))
    if optimizer is not None and not config.checkpoint.no_save_optim:
        tensors |= optimizer_tensors(optimizer.named_state())
    if not config.checkpoint.no_save_rng:
        tensors |= {
            f"{RNG}{rank_in(group)}.{name}": state for name, state in capture_rng_state().items()
        }
    common = {
        "iteration": state.iteration,
        "consumed_train_samples": state.consumed_samples,
        "data_fingerprint": data_fingerprint,
        "dropout_seed": None if config.checkpoint.no_save_rng else state.dropout_seed,
        "optimizer": _optimizer_facts(config, optimizer),
        "loss_scale": _loss_scale(config, optimizer),
        "world_size": size_of(group),
        "padded_vocab_size": padded_vocab_size(unwrap(model)),
        "architecture": architecture(config.model),
        "schedule": schedule(config),
        "tokenizer": tokenizer_facts(tokenizer),
        "torch": torch.__version__,
        "config": config_data(config),
    }
    copies = tokenizer_copies(tokenizer) if tokenizer is not None else {}
    files = {name: path for name, (_, path) in copies.items()}
    return CheckpointContent(tensors=tensors, common=common, files=files)


def load_checkpoint(
    folder: str | Place | None,
    *,
    config: RunConfig,
    model: nn.Module,
    optimizer: SavedOptimizer | None,
    tokenizer: SavedTokenizer | None = None,
    group: ProcessGroup | None = None,
) -> LoadedState:
    """Load a run into model and optimizer, in place; on every rank.

    The number of ranks and all parallel sizes may differ from those that saved.

    Args:
        folder: ``--load``; None begins a fresh run, or one with ``--pretrained-checkpoint``.
        config: Of this run; ``--ckpt-step``, ``--pretrained-checkpoint`` (taken where ``folder``
            holds no checkpoint, as with ``--finetune``), ``--finetune``, ``--no-load-optim``,
            ``--no-load-rng``, ``--override-opt_param-scheduler`` and ``--allow-fresh-start`` are
            read from it. ``--skip-train`` needs no optimizer: its state and the schedule are not
            compared and not loaded.
        model: The model, or the DataParallelBase around it.
        optimizer: None when there is none (evaluation).
        tokenizer: Of this run, compared with the checkpoint's.
        group: The ranks that find one folder together; all when None.

    Raises:
        CheckpointError: Nothing there, damaged, or it does not fit this run; every rank raises the
            same, and model and optimizer are as before unless reading itself failed.
    """
    options, group = config.checkpoint, group or world_group()
    fresh = LoadedState(iteration=0, consumed_train_samples=0, dropout_seed=config.training.seed)
    start = _start(folder, options, group)
    if start is None:
        if options.pretrained_checkpoint is not None:
            raise CheckpointError(
                f"--pretrained-checkpoint {options.pretrained_checkpoint} holds no checkpoint"
            )
        if folder is None or options.allow_fresh_start:
            return fresh
        raise CheckpointError(
            f"--load {folder} holds no checkpoint; to start from the beginning there, "
            "add --allow-fresh-start"
        )
    if start.weights_only:
        options = replace(options, finetune=True)
        config = replace(config, checkpoint=options)
    if start.is_huggingface:
        from megatron.training.huggingface_load import load_huggingface  # an optional package

        return load_huggingface(start, config, model, optimizer, group)
    without_optim = options.finetune or options.no_load_optim or config.training.skip_train
    with_optim = optimizer is not None and not without_optim
    restored = optimizer if with_optim else None
    facts = tokenizer_facts(tokenizer)
    # a node with a folder of its own may fail alone: all have read before any gathers weights
    opened, notices = attempt(
        lambda: _open_and_read(start, config, model, restored, facts, group), world_group()
    )
    if optimizer is not None:
        optimizer.after_load(with_optim=with_optim)
        if with_optim:
            optimizer.step_count = opened.common["optimizer"]["step_count"]
            optimizer.grad_scaler.load_state_dict(opened.common.get("loss_scale"))
    return _loaded_state(opened, config, notices)


def _start(
    folder: str | Place | None, options: CheckpointConfig, group: ProcessGroup | None
) -> StartingPoint | None:
    """Find the checkpoint to begin with: the first rank looks, all take what it finds."""
    options = replace(options, load=None if folder is None else str(folder))
    found = attempt(lambda: starting_point(options) if rank_in(group) == 0 else None, group)
    return broadcast(found, group)


def restart_seed(seed: int, iteration: int) -> int:
    """Return the seed of a fresh dropout stream for a run that restarts at ``iteration``."""
    digest = hashlib.sha256(f"{seed}/restart/{iteration}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a DataParallelBase, its weights complete, or the model."""
    if isinstance(model, DataParallelBase):
        model.finish_param_sync()
    inner = getattr(model, "module", model)
    assert isinstance(inner, nn.Module), f"{type(model)}.module is no module"
    return inner


def world_group() -> ProcessGroup | None:
    """Return the group of all ranks; None in a process without torch.distributed."""
    return dist.group.WORLD if dist.is_initialized() else None


def kept_weights(model: nn.Module) -> list[tuple[str, ParamRole, ParamBlocks]] | None:
    """Return what this rank keeps of a sharded model; None when it holds whole parameters."""
    return model.saved_weights() if is_fully_sharded(model) else None


def padded_vocab_size(model: nn.Module) -> int | None:
    """Return the rows of the whole word embedding; None on ranks that have none of it."""
    embedding = dict(model.named_parameters()).get(_EMBEDDING)
    if embedding is None:
        return None
    split = role_of(embedding).split
    return (embedding.shape if split is None else split.whole_shape(tuple(embedding.shape)))[0]


def _optimizer_facts(config: RunConfig, optimizer: SavedOptimizer | None) -> dict[str, Any] | None:
    if optimizer is None or config.checkpoint.no_save_optim:
        return None
    return {"kind": config.optimizer.optimizer, "step_count": optimizer.step_count}


def _loss_scale(config: RunConfig, optimizer: SavedOptimizer | None) -> dict[str, float] | None:
    if optimizer is None or config.checkpoint.no_save_optim:
        return None
    return optimizer.grad_scaler.state_dict()


def _open_and_read(
    start: StartingPoint,
    config: RunConfig,
    model: nn.Module,
    optimizer: SavedOptimizer | None,
    tokenizer: dict[str, Any] | None,
    group: ProcessGroup | None,
) -> tuple[OpenCheckpoint, list[str]]:
    """Read what fits this run, in place; the ranks of ``group`` fail together. Adds notices."""
    opened = open_checkpoint(start.folder, group, iteration=start.iteration)
    assert opened is not None, f"{start} was found and then was not"
    with_rng = not (config.checkpoint.finetune or config.checkpoint.no_load_rng)
    refuse_misfits(opened, config, tokenizer, optimizer is not None, with_rng)
    return opened, _read(opened, model, optimizer, with_rng, group)


def _read(
    opened: OpenCheckpoint,
    model: nn.Module,
    optimizer: SavedOptimizer | None,
    with_rng: bool,
    group: ProcessGroup | None,
) -> list[str]:
    """Read all tensors that are wanted, in place; returns notices."""
    weights = kept_weights(model)
    tensors = model_tensors(unwrap(model), weights)
    _refuse_vocab(opened, unwrap(model), group)
    prefixes = [MODEL]
    if optimizer is not None:
        tensors |= optimizer_tensors(optimizer.named_state())
        prefixes.append(OPTIMIZER)
    states: dict[str, Tensor] = {}
    world = world_group()
    same_world = opened.common["world_size"] == size_of(world)
    if with_rng and same_world:
        prefix = f"{RNG}{rank_in(world)}."
        stored = attempt(lambda: stored_tensors(opened.path), group)
        states = {
            key.removeprefix(prefix): torch.empty(facts.shape, dtype=facts.dtype)
            for key, facts in stored.items()
            if key.startswith(prefix)
        }
        tensors |= {prefix + name: state for name, state in states.items()}
        prefixes.append(RNG)
    read_tensors(opened.path, tensors, group, prefixes=tuple(prefixes))
    if optimizer is None and is_fully_sharded(model):
        model.take_weights(weights or ())
    if states:
        restore_rng_state(states)
    if with_rng and not same_world:
        return [
            f"saved by {_ranks(opened.common['world_size'])}, resumed on {size_of(world)}: torch's "
            "global generators start anew (dropout and data order do not use them)"
        ]
    return []


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _refuse_vocab(opened: OpenCheckpoint, model: nn.Module, group: ProcessGroup | None) -> None:
    sizes = gather(padded_vocab_size(model), group)  # the first pipeline rank has an embedding
    then, now = opened.common["padded_vocab_size"], next(filter(None, sizes), None)
    if then is not None and now is not None and then != now:
        raise CheckpointError(
            f"{opened.path} has a vocabulary padded to {then} and this run pads it to {now}: the "
            f"tokenizer or --make-vocab-size-divisible-by differs; --padded-vocab-size {then} "
            "takes the checkpoint's"
        )


def _loaded_state(opened: OpenCheckpoint, config: RunConfig, notices: list[str]) -> LoadedState:
    common, seed = opened.common, config.training.seed
    if config.checkpoint.finetune:
        return LoadedState(
            iteration=0, consumed_train_samples=0, dropout_seed=seed, path=opened.path
        )
    iteration = common["iteration"]
    dropout_seed = common["dropout_seed"]
    if config.checkpoint.no_load_rng:
        dropout_seed = restart_seed(seed, iteration)
        notices = [*notices, "--no-load-rng: dropout goes on with a fresh stream"]
    changes = [f"changed since the checkpoint: {text}" for text in changed_options(common, config)]
    return LoadedState(
        iteration=iteration,
        consumed_train_samples=common["consumed_train_samples"],
        dropout_seed=dropout_seed,
        path=opened.path,
        data_fingerprint=common.get("data_fingerprint"),
        notices=tuple(notices + softmax_notices(common, config) + changes),
    )
