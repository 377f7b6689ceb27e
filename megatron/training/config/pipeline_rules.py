"""Rules of pipeline parallelism: layers fill the stages, and a schedule walks them."""

from collections.abc import Iterator

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.layer_homes import V_SHAPED, split_of
from megatron.training.config.checks import Check, Rule

_OF_SEVERAL_RANKS = (
    "pipeline_schedule num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank "
    "microbatch_group_size_per_virtual_pipeline_stage decoder_first_pipeline_num_layers "
    "decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split "
    "account_for_loss_in_pipeline_split pipeline_model_parallel_layout"
)


def stages(check: Check) -> Iterator[str]:
    """Layers go to the stages as the options say, and the schedule takes as many stages a rank."""
    model = check.config.model
    if model.pipeline_model_parallel_size == 1:
        yield from check.useless(
            _OF_SEVERAL_RANKS, "with --pipeline-model-parallel-size 1: one rank has the whole model"
        )
        return
    if model.pipeline_model_parallel_layout == "auto":
        return  # could not be derived: other problems say why
    try:
        num_stages = len(split_of(model))
    except ConfigError as error:
        yield from error.problems or (str(error),)
        return
    yield from _schedule(check, num_stages // model.pipeline_model_parallel_size)


def _schedule(check: Check, stages_a_rank: int) -> Iterator[str]:
    """The schedule takes ``stages_a_rank``, and groups of microbatches are large enough."""
    model = check.config.model
    name, pp = model.pipeline_schedule, model.pipeline_model_parallel_size
    wanted = 2 if name in V_SHAPED else 1
    if name != "1f1b" and stages_a_rank != wanted:
        yield (
            f"{check.show('pipeline_schedule')} has {wanted} virtual stage{'s' * (wanted > 1)} a "
            f"rank, and the split of layers makes {stages_a_rank}; 1f1b takes any number"
        )
    ends = check.given("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    if name in V_SHAPED and ends:
        yield (
            f"{check.show(*ends)} with {check.show('pipeline_schedule')}: the first rank has both "
            "ends of the model; say with --pipeline-model-parallel-layout what each stage has"
        )
    group = model.microbatch_group_size_per_virtual_pipeline_stage
    if group is None:
        return
    if name != "1f1b" or stages_a_rank == 1:
        yield from check.useless(
            "microbatch_group_size_per_virtual_pipeline_stage",
            "without several virtual stages a rank (--num-virtual-stages-per-pipeline-rank) under "
            "--pipeline-schedule 1f1b",
        )
    elif group < pp:
        yield (
            f"{check.show('microbatch_group_size_per_virtual_pipeline_stage')} must be at least "
            f"{check.show('pipeline_model_parallel_size')}: the first microbatch needs {pp} steps "
            "to come back to a rank"
        )


def companions(check: Check) -> Iterator[str]:
    """What does not work over stages yet."""
    model = check.config.model
    if model.pipeline_model_parallel_size == 1:
        return
    shown = check.show("pipeline_model_parallel_size")
    if check.config.logging.moe_routing_trace_path is not None:
        yield (
            f"{shown} with --moe-routing-trace-path is not offered yet: a trace holds the layers "
            "of one rank; leave one out"
        )
    if model.moe_enable_routing_replay:
        yield (
            f"--moe-enable-routing-replay with {shown} is not offered: several microbatches are "
            "under way at once; replay with --pipeline-model-parallel-size 1"
        )


PIPELINE_RULES: tuple[Rule, ...] = (stages, companions)
