"""Rules of communication that hides behind computation; each yields sentences."""

from collections.abc import Iterator

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.layer_homes import schedule_of
from megatron.core.pipeline_parallel.schedule_pairs import can_pair
from megatron.training.config.checks import Check, Rule

_FLAG = "--overlap-moe-expert-parallel-comm"


def expert_overlap(check: Check) -> Iterator[str]:
    """An all-to-all hides behind another microbatch: both must be there."""
    model, training = check.config.model, check.config.training
    if not model.overlap_moe_expert_parallel_comm:
        if model.delay_wgrad_compute:
            yield f"--delay-wgrad-compute needs {_FLAG}: add it, or leave the other out"
        return
    if model.num_moe_experts is None:
        yield f"{_FLAG} needs a MoE layer: add --num-experts, or leave it out"
        return
    if model.expert_model_parallel_size == 1:
        yield (
            f"{_FLAG} has no effect with --expert-model-parallel-size 1: nothing travels to "
            "experts on other ranks"
        )
    if model.moe_token_dispatcher_type == "allgather":
        yield (
            f"{_FLAG} needs an all-to-all to hide: use --moe-token-dispatcher-type alltoall, "
            "alltoall_dedup or alltoall_hierarchical"
        )
    at_once = training.micro_batch_size * model.data_ranks(check.world_size)
    if training.global_batch_size == at_once:
        yield (
            f"{_FLAG} hides the all-to-all of one microbatch behind another, and a step has only "
            f"one: {check.show('global_batch_size')} = {check.show('micro_batch_size')} x "
            f"{at_once // training.micro_batch_size} data-parallel ranks; use a "
            f"--global-batch-size of {2 * at_once} or more, or leave it out"
        )
    elif model.pipeline_model_parallel_size > 1:
        yield from _pairs(check, max(1, training.global_batch_size // at_once))


def _pairs(check: Check, num_microbatches: int) -> Iterator[str]:
    """The schedule must have forwards and backwards that may run as one."""
    model = check.config.model
    try:
        if can_pair(schedule_of(model, num_microbatches)):
            return
    except ConfigError:  # rules of the pipeline say what
        return
    size = check.show("pipeline_model_parallel_size")
    if model.pipeline_schedule == "1f1b":
        yield (
            f"{_FLAG} with {size} needs several virtual stages a rank: with one, a rank and the "
            "next would wait for each other's halves of a pair; add "
            "--num-virtual-stages-per-pipeline-rank 2, or use --pipeline-schedule dualpipev"
        )
    elif model.pipeline_schedule == "dualpipev":
        yield (
            f"{_FLAG} with --pipeline-schedule dualpipev needs as many microbatches a step as "
            f"{size}, not {num_microbatches}: raise --global-batch-size"
        )
    else:
        yield (
            f"{_FLAG} runs whole backwards beside forwards, and {check.show('pipeline_schedule')} "
            "splits them; use dualpipev, or 1f1b with several virtual stages a rank"
        )


OVERLAP_RULES: tuple[Rule, ...] = (expert_overlap,)
