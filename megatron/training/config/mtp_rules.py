"""Rules of multi-token prediction; each yields sentences."""

from collections.abc import Iterator

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.layer_homes import split_of
from megatron.core.pipeline_parallel.layer_split import layout_of
from megatron.training.config.checks import Check, Rule


def multi_token_prediction(check: Check) -> Iterator[str]:
    """There are tokens to predict, and the modules are beside the output head."""
    model = check.config.model
    if model.mtp_num_layers is None:
        yield from check.useless("mtp_loss_scaling_factor", "without --mtp-num-layers")
        return
    shown, length = check.show("mtp_num_layers"), check.config.data.seq_length
    if 0 < length <= model.mtp_num_layers:
        yield f"{shown} must be below {check.show('seq_length')}: no token is so far ahead"
    if model.pipeline_model_parallel_layout is None or model.mtp_num_layers < 1:
        return
    try:
        stages = split_of(model)
    except ConfigError:  # rules of the pipeline say what
        return
    if len(stages[-1].mtp_layers) < model.mtp_num_layers:
        yield (
            f"--pipeline-model-parallel-layout {layout_of(stages)}: each m must be in the stage of "
            "L, for multi-token prediction reads the output head"
        )


MTP_RULES: tuple[Rule, ...] = (multi_token_prediction,)
