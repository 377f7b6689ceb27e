"""The schedule that the options mean: from iterations, as users count, to samples.

Pure and without torch: the rules build it too, so that its contradictions are found at once.
"""

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.config.run_config import RunConfig


def build_scheduler(config: RunConfig) -> OptimizerParamScheduler:
    """Return the schedule of a run whose options are complete.

    Raises:
        ConfigError: The options contradict each other; all problems at once.
    """
    schedule, optimizer, training = config.scheduler, config.optimizer, config.training
    batch = training.global_batch_size
    decay = schedule.lr_decay_iters * batch
    warmup = schedule.lr_warmup_iters * batch
    if schedule.lr_warmup_fraction is not None:
        warmup = int(schedule.lr_warmup_fraction * decay)
    wsd = schedule.lr_wsd_decay_iters
    start_wd, end_wd = schedule.start_weight_decay, schedule.end_weight_decay
    if schedule.weight_decay_incr_style == "constant":
        start_wd = end_wd = None
    return OptimizerParamScheduler(
        init_lr=schedule.lr_warmup_init,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=optimizer.weight_decay if start_wd is None else start_wd,
        end_wd=optimizer.weight_decay if end_wd is None else end_wd,
        wd_incr_steps=training.train_iters * batch,
        wd_incr_style=schedule.weight_decay_incr_style,
        wsd_decay_steps=None if wsd is None else wsd * batch,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )
