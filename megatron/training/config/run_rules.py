"""Rules of batches, optimizer, schedule, checkpoints and the machine; each yields sentences."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron.training.config.checks import Check, Rule

TRACKER = "latest_checkpointed_iteration.txt"


def batches(check: Check) -> Iterator[str]:
    """A step is a whole number of microbatches on every rank."""
    training, world = check.config.training, check.world_size
    unit = training.micro_batch_size * world
    if training.global_batch_size % unit:
        below = training.global_batch_size // unit * unit
        fits = f"{below} or {below + unit}" if below else f"{unit}"
        yield (
            f"{check.show('global_batch_size')} must be a multiple of "
            f"{check.show('micro_batch_size')} x {world} data-parallel ranks (= {unit}); "
            f"nearest: {fits}"
        )


def optimizer(check: Check) -> Iterator[str]:
    """Options of one optimizer mean nothing to the other."""
    if check.config.optimizer.optimizer == "sgd":
        yield from check.useless("adam_beta1 adam_beta2 adam_eps", "with --optimizer sgd")
    else:
        yield from check.useless("sgd_momentum", "with --optimizer adam")


def learning_rate(check: Check) -> Iterator[str]:
    """The schedule rises, then falls, within the iterations it has."""
    best, schedule = check.config.optimizer, check.config.scheduler
    if best.min_lr > best.lr:
        yield f"{check.show('min_lr')} must not be larger than {check.show('lr')}"
    if schedule.lr_warmup_iters and schedule.lr_warmup_fraction is not None:
        yield f"{check.show('lr_warmup_iters', 'lr_warmup_fraction')} exclude each other"
    elif schedule.lr_warmup_iters and schedule.lr_warmup_iters >= schedule.lr_decay_iters:
        yield (
            f"{check.show('lr_warmup_iters')} must be smaller than {check.show('lr_decay_iters')}, "
            "which counts the warm-up"
        )
    if not schedule.lr_warmup_iters and schedule.lr_warmup_fraction is None:
        yield from check.useless(
            "lr_warmup_init", "without --lr-warmup-iters or --lr-warmup-fraction"
        )
    elif schedule.lr_warmup_init > best.lr:
        yield f"{check.show('lr_warmup_init')} must not be larger than {check.show('lr')}"
    if schedule.lr_decay_style == "constant":
        yield from check.useless("min_lr", "with --lr-decay-style constant")


def final_decay(check: Check) -> Iterator[str]:
    """WSD keeps the rate and decays at the end."""
    schedule = check.config.scheduler
    if schedule.lr_decay_style != "WSD":
        yield from check.useless(
            "lr_wsd_decay_style lr_wsd_decay_iters", "without --lr-decay-style WSD"
        )
    elif schedule.lr_wsd_decay_iters is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters, the length of its final decay"
    elif schedule.lr_wsd_decay_iters > schedule.lr_decay_iters:
        yield (
            f"{check.show('lr_wsd_decay_iters')} must not be larger than "
            f"{check.show('lr_decay_iters')}"
        )


def weight_decay(check: Check) -> Iterator[str]:
    """A changing weight decay has both ends, a constant one has none."""
    schedule = check.config.scheduler
    ends = ("start_weight_decay", "end_weight_decay")
    if schedule.weight_decay_incr_style == "constant":
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
            "save_interval keep_last no_save_optim no_save_rng", "without --save"
        )
    for name in ("save", "log_dir", "tensorboard_dir", "data_cache_path"):
        place = check.value(name)
        if place is not None and Path(place).exists() and not Path(place).is_dir():
            yield f"{check.show(name)} is a file; a folder is needed"


def loading(check: Check) -> Iterator[str]:
    """--load must find a checkpoint, unless a fresh start is wanted."""
    wanted = check.config.checkpoint
    if wanted.load is None:
        yield from check.useless(
            "ckpt_step allow_fresh_start finetune no_load_optim no_load_rng "
            "override_opt_param_scheduler",
            "without --load",
        )
        return
    if not wanted.allow_fresh_start and not (Path(wanted.load) / TRACKER).is_file():
        what = "has no checkpoint" if Path(wanted.load).is_dir() else "is no folder"
        yield (
            f"{check.show('load')} {what} (looked for {Path(wanted.load) / TRACKER}); for the "
            "first run of a job that resumes itself add --allow-fresh-start"
        )
    if wanted.finetune:
        yield from check.useless("override_opt_param_scheduler", "with --finetune")


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


def evaluation(check: Check) -> Iterator[str]:
    """Evaluation needs batches to evaluate on."""
    if check.config.validation.eval_iters == 0:
        why = "with --eval-iters 0" if check.given("eval_iters") else "without validation data"
        yield from check.useless("eval_interval", why)


RUN_RULES: tuple[Rule, ...] = (
    batches,
    optimizer,
    learning_rate,
    final_decay,
    weight_decay,
    saving,
    loading,
    machine,
    evaluation,
)
