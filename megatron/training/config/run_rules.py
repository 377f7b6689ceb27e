"""Rules of batches, optimizer, schedule, checkpoints and the machine; each yields sentences."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.core.dist_checkpointing.folders import TRACKER, Place, complete_iterations
from megatron.core.dist_checkpointing.foreign import refuse_foreign
from megatron.core.dist_checkpointing.object_folders import place, store_problem
from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.models.huggingface.config_file import is_hf_folder
from megatron.core.num_microbatches_calculator import NumMicroBatches
from megatron.training.config.checks import Check, Rule
from megatron.training.schedule_settings import build_scheduler


def batches(check: Check) -> Iterator[str]:
    """A step is a whole number of microbatches on every rank."""
    training = check.config.training
    yield from _problems_of(
        lambda: NumMicroBatches(
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_size=check.config.model.data_ranks(check.world_size),
        )
    )


def optimizer(check: Check) -> Iterator[str]:
    """Options of one optimizer mean nothing to the other."""
    if check.config.optimizer.optimizer == "sgd":
        yield from check.useless("adam_beta1 adam_beta2 adam_eps", "with --optimizer sgd")
    else:
        yield from check.useless("sgd_momentum", "with --optimizer adam")


def loss_scaling(check: Check) -> Iterator[str]:
    """A loss scale needs fp16, and a constant one does not move."""
    settings = check.config.optimizer
    if not check.config.model.fp16:
        names = "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis"
        yield from check.useless(names, "without --fp16")
        return
    if settings.loss_scale is not None:
        names = "initial_loss_scale min_loss_scale loss_scale_window hysteresis"
        yield from check.useless(names, "with --loss-scale, which is constant")
        return
    if settings.min_loss_scale > settings.initial_loss_scale:
        yield (
            f"{check.show('min_loss_scale')} must be at most {check.show('initial_loss_scale')}, "
            "where the loss scale begins"
        )
    if settings.loss_scale_window % 1:
        yield f"{check.show('loss_scale_window')} counts updates: give a whole number"


def schedule(check: Check) -> Iterator[str]:
    """Rates, decays and lengths agree with each other, as the schedule itself sees it."""
    settings = check.config.scheduler
    shown = [
        "lr_warmup_iters" if settings.lr_warmup_fraction is None else "lr_warmup_fraction",
        "lr_decay_iters" if check.given("lr_decay_iters") else "train_iters",
        *(["lr_wsd_decay_iters"] if settings.lr_wsd_decay_iters else []),
        "global_batch_size",
    ]
    for problem in _problems_of(lambda: build_scheduler(check.config)):
        yield f"{problem}; here: {check.show(*shown)}" if " samples" in problem else problem


def learning_rate(check: Check) -> Iterator[str]:
    """Options of the learning rate must have an effect."""
    settings = check.config.scheduler
    if settings.lr_warmup_iters and settings.lr_warmup_fraction is not None:
        yield f"{check.show('lr_warmup_iters', 'lr_warmup_fraction')} exclude each other"
    if not settings.lr_warmup_iters and settings.lr_warmup_fraction is None:
        yield from check.useless(
            "lr_warmup_init", "without --lr-warmup-iters or --lr-warmup-fraction"
        )
    if settings.lr_decay_style == "constant":
        yield from check.useless("min_lr", "with --lr-decay-style constant")
    if settings.lr_decay_style != "WSD":
        yield from check.useless(
            "lr_wsd_decay_style lr_wsd_decay_iters", "without --lr-decay-style WSD"
        )


def weight_decay(check: Check) -> Iterator[str]:
    """A changing weight decay has both ends, a constant one has none."""
    ends = ("start_weight_decay", "end_weight_decay")
    if check.config.scheduler.weight_decay_incr_style == "constant":
        yield from check.useless(" ".join(ends), "with --weight-decay-incr-style constant")
        return
    missing = [check.options[name].flag for name in ends if check.value(name) is None]
    if missing:
        yield f"{check.show('weight_decay_incr_style')} needs {' and '.join(missing)}"
    else:
        yield from check.useless("weight_decay", "with --start-weight-decay and --end-weight-decay")


def saving(check: Check) -> Iterator[str]:
    """Options of saving need a folder to save to."""
    folder = check.config.checkpoint.save
    if folder is None:
        yield from check.useless(
            "save_interval async_save keep_last save_retain_interval no_save_optim no_save_rng "
            "non_persistent_save_interval",
            "without --save",
        )
    if check.config.logging.moe_routing_trace_path is None:
        yield from check.useless(
            "moe_routing_trace_max_training_iters moe_routing_trace_max_mb",
            "without --moe-routing-trace-path",
        )
    for name in (
        "save",
        "log_dir",
        "tensorboard_dir",
        "data_cache_path",
        "moe_routing_trace_path",
        "non_persistent_global_ckpt_dir",
        "non_persistent_local_ckpt_dir",
    ):
        if check.value(name) is not None:
            yield from _unusable_folder(check, name)
    if folder is not None and not store_problem(place(folder)):
        yield from _other_run(check, place(folder))


def _unusable_folder(check: Check, name: str) -> Iterator[str]:
    """Say why the folder of option ``name`` cannot be made or written to."""
    found = place(check.value(name))
    if not isinstance(found, Path):
        urls = ("save", "non_persistent_global_ckpt_dir")
        problem = store_problem(found) if name in urls else "is a URL; a folder is needed"
        if problem:
            yield f"{check.show(name)} {problem}"
        return
    path = found.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        what = "is a file" if there == path else f"lies below the file {there}"
        yield f"{check.show(name)} {what}; a folder is needed"
    elif not os.access(there, os.W_OK):
        yield f"{check.show(name)} cannot be written: no permission for {there}"


def _other_run(check: Check, folder: Place) -> Iterator[str]:
    """A run that does not go on from --save must not mix its checkpoints with others there."""
    load = check.config.checkpoint.load
    if load is not None and place(load).resolve() == folder.resolve():
        return
    if found := complete_iterations(folder):
        if check.config.checkpoint.moe_use_upcycling:
            yield (
                f"{check.show('save')} already holds checkpoints (newest: iteration {found[-1]}), "
                "and a model is upcycled once: to go on with it give --load in the place of "
                f"--moe-use-upcycling, --load {folder}; or choose another folder"
            )
            return
        yield (
            f"{check.show('save')} already holds checkpoints of another run (newest: iteration "
            f"{found[-1]}); add --load {folder} to go on with it, or choose another folder"
        )


def loading(check: Check) -> Iterator[str]:
    """--load must find a checkpoint, unless a fresh start is wanted."""
    wanted = check.config.checkpoint
    if wanted.load is None:
        yield from check.useless(
            "ckpt_step allow_fresh_start finetune no_load_optim no_load_rng "
            "override_opt_param_scheduler use_checkpoint_opt_param_scheduler",
            "without --load",
        )
        return
    folder = place(wanted.load)
    if problem := store_problem(folder):
        yield f"{check.show('load')} {problem}"
        return
    try:
        refuse_foreign(folder)
    except CheckpointError as error:
        yield f"{check.show('load')}: {error}"
        return
    is_theirs = isinstance(folder, Path) and is_hf_folder(folder)
    there = is_theirs or (folder / TRACKER).is_file() or bool(complete_iterations(folder))
    if not wanted.allow_fresh_start and not there and wanted.pretrained_checkpoint is None:
        what = "has no checkpoint" if folder.is_dir() else "is no folder"
        yield (
            f"{check.show('load')} {what} (looked for {folder / TRACKER}); for the "
            "first run of a job that resumes itself add --allow-fresh-start"
        )
    if wanted.finetune:
        yield from check.useless(
            "override_opt_param_scheduler use_checkpoint_opt_param_scheduler", "with --finetune"
        )


def machine(check: Check) -> Iterator[str]:
    """Device, communication library and optional packages go together."""
    where = check.config.distributed
    if where.device == "cpu" and where.distributed_backend == "nccl":
        yield "--distributed-backend nccl needs --device cuda; on cpu leave it out or say gloo"
    if check.config.logging.tensorboard_dir is None:
        yield from check.useless(
            "tensorboard_log_interval tensorboard_queue_size", "without --tensorboard-dir"
        )
    elif importlib.util.find_spec("tensorboard") is None:
        yield (
            f"{check.show('tensorboard_dir')} needs the package tensorboard: pip install "
            "tensorboard, or use --log-dir for metrics.jsonl"
        )


def cpu_settings(check: Check) -> Iterator[str]:
    """Settings of a machine of CPUs mean nothing elsewhere."""
    if check.config.distributed.device == "cuda":
        names = "cpu_core_binding cpu_allocator cpu_float32_products"
        yield from check.useless(names, "with --device cuda")
    elif check.config.model.fp64:
        yield from check.useless("cpu_float32_products", "with --fp64")


def cpu_kernels(check: Check) -> Iterator[str]:
    """Compiled kernels that are asked for must have something to compute."""
    model, shown = check.config.model, check.show("cpu_kernels")
    if check.config.distributed.cpu_kernels != "compiled":
        return
    if check.config.distributed.device == "cuda":
        yield f"{shown} is for CPUs: add --device cpu, or leave it out"
    if model.params_dtype_name in ("float64", "float16"):
        wrong = "--fp64" if model.fp64 else "--fp16"
        yield f"{shown} computes bf16 and fp32 only: leave {wrong} or it out"


def sharded_optimizer(check: Check) -> Iterator[str]:
    """Weights are gathered where optimizer state is shared out, and beside reductions."""
    options = check.config.ddp
    if not options.overlap_param_gather:
        return
    if not options.use_distributed_optimizer:
        yield "--overlap-param-gather needs --use-distributed-optimizer: else nothing is gathered"
    if not options.overlap_grad_reduce:
        yield "--overlap-param-gather needs --overlap-grad-reduce"


def fully_sharded(check: Check) -> Iterator[str]:
    """What fully_shard does itself is no option beside it, and it knows data ranks alone."""
    if not check.config.ddp.use_torch_fsdp2:
        yield from check.useless(
            "torch_fsdp2_no_reshard_after_forward", "without --use-torch-fsdp2"
        )
        return
    model = check.config.model
    if check.config.ddp.use_distributed_optimizer:
        yield (
            "--use-torch-fsdp2 and --use-distributed-optimizer exclude each other: the former "
            "shares out the optimizer's state as well"
        )
    yield from check.useless(
        "overlap_grad_reduce overlap_param_gather bucket_size",
        "with --use-torch-fsdp2, which gathers and reduces each layer beside its neighbours",
    )
    axes = ("tensor_model", "pipeline_model", "expert_tensor")
    if model.overlap_moe_expert_parallel_comm:
        yield (
            "--use-torch-fsdp2 with --overlap-moe-expert-parallel-comm is not offered: two "
            "microbatches that compute at once would let go of each other's layers"
        )
    sizes = [f"{axis}_parallel_size" for axis in axes]
    split = [name for name in sizes if (getattr(model, name) or 1) > 1]
    if split:
        yield (
            f"--use-torch-fsdp2 with {check.show(*split)} is not offered: it shares parameters out "
            "over data-parallel ranks; with it use 1 of each, --expert-model-parallel-size and "
            "--context-parallel-size"
        )


def evaluation(check: Check) -> Iterator[str]:
    """Evaluation needs batches to evaluate on."""
    # --eval-interval beside an explicit --eval-iters 0 is how scripts turn evaluation off
    if check.config.validation.eval_iters == 0 and not check.given("eval_iters"):
        yield from check.useless("eval_interval", "without validation data")


def dry_run(check: Check) -> Iterator[str]:
    """A dry run is one process, and its options need it."""
    if not check.config.dry_run.dry_run:
        names = "dry_run_world_size dry_run_memory_gib dry_run_json"
        yield from check.useless(names, "without --dry-run")
        return
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        yield (
            f"--dry-run looks at all ranks from one process, and {started} were started: leave out "
            f"torchrun and add --dry-run-world-size {started}"
        )
    if check.config.ddp.use_torch_fsdp2:
        yield (
            "--dry-run with --use-torch-fsdp2 is not offered: torch gathers its shards by itself, "
            "unseen; see --use-distributed-optimizer for what the optimizer's state alone saves"
        )
    target = check.config.dry_run.dry_run_json
    if target is not None and not Path(target).resolve().parent.is_dir():
        yield f"{check.show('dry_run_json')}: {Path(target).resolve().parent} is no folder"


def _problems_of(build: Callable[[], object]) -> tuple[str, ...]:
    """Return what a plan itself finds wrong with the settings that it would be built from."""
    try:
        build()
    except ConfigError as error:
        return error.problems
    return ()


RUN_RULES: tuple[Rule, ...] = (
    batches,
    optimizer,
    loss_scaling,
    schedule,
    learning_rate,
    weight_decay,
    saving,
    loading,
    machine,
    cpu_kernels,
    cpu_settings,
    sharded_optimizer,
    fully_sharded,
    evaluation,
    dry_run,
)

RULES_OF_FOLDERS: tuple[Rule, ...] = (saving, loading)
"""Those that read disks. What they say is the same for every layout."""
