"""Which stages a pipeline rank holds, and in which order it walks them: options to plans. Pure."""

from typing import TYPE_CHECKING

from megatron.core.pipeline_parallel.layer_split import SplitOptions, split_layers
from megatron.core.pipeline_parallel.schedule_plan import build_schedule
from megatron.core.pipeline_parallel.schedule_step import Schedule
from megatron.core.stage_layers import StageLayers

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

V_SHAPED = ("dualpipev",)
"""Schedules whose ranks hold two stages each, the second ones in reverse order of ranks."""


def split_of(config: "TransformerConfig") -> tuple[StageLayers, ...]:
    """Return what each stage of the model holds.

    Raises:
        ConfigError: The layers cannot be split so; see ``split_layers``.
    """
    stages_a_rank = config.num_virtual_stages_per_pipeline_rank
    says_stages = (
        stages_a_rank
        or config.num_layers_per_virtual_pipeline_stage
        or config.pipeline_model_parallel_layout
    )
    if config.pipeline_schedule in V_SHAPED and not says_stages:
        stages_a_rank = 2
    return split_layers(
        SplitOptions(
            num_layers=config.num_layers,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=config.num_layers_per_virtual_pipeline_stage,
            num_virtual_stages_per_pipeline_rank=stages_a_rank,
            decoder_first_pipeline_num_layers=config.decoder_first_pipeline_num_layers,
            decoder_last_pipeline_num_layers=config.decoder_last_pipeline_num_layers,
            account_for_embedding_in_pipeline_split=config.account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split=config.account_for_loss_in_pipeline_split,
            pipeline_model_parallel_layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_depths,
        )
    )


def schedule_of(config: "TransformerConfig", num_microbatches: int) -> Schedule:
    """Return the schedule of one optimizer step.

    Args:
        config: Sizes and kind of the pipeline.
        num_microbatches: Of one step on one data-parallel rank.

    Raises:
        ConfigError: Sizes that make no schedule, or layers that cannot be split.
    """
    pp = config.pipeline_model_parallel_size
    return build_schedule(
        config.pipeline_schedule,
        pp=pp,
        num_microbatches=num_microbatches,
        vpp=len(split_of(config)) // pp,
        group_size=config.microbatch_group_size_per_virtual_pipeline_stage,
    )


def stages_of_rank(config: "TransformerConfig", rank: int) -> tuple[StageLayers, ...]:
    """Return the stages of pipeline rank ``rank``, in the order of the model.

    Raises:
        ConfigError: See ``schedule_of``.
    """
    stages, schedule = split_of(config), schedule_of(config, 1)
    return tuple(stages[schedule.stage(rank, chunk)] for chunk in range(schedule.chunks))
