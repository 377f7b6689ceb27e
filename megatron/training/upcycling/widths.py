"""Which ffn channels of the dense MLP go where, and the options of the upcycled model. No torch."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.per_layer_config import MoEPerLayerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.config.run_config import RunConfig
from megatron.training.resume_rules import architecture, architecture_problems
from megatron.training.upcycling.preservation import factor_of_router, preservation_problems

MOE_OPTIONS = frozenset(field.name for field in fields(MoEPerLayerConfig))
"""Options of the model that upcycling may set."""
_NEW = ("--num-experts", "--ffn-hidden-size", "choice of experts", "weights over their sum")


class Channels(NamedTuple):
    """How the ffn channels of a dense MLP are shared out; slices of a copy follow each other."""

    shared: int
    """The first ones, which the shared expert takes."""
    slice_width: int
    """Of each routed expert."""
    granularity: int

    @property
    def total(self) -> int:
        """Channels of the dense MLP."""
        return self.shared + self.slice_width * self.granularity

    def of_expert(self, expert: int) -> slice:
        """Return the channels of a routed expert: slice e mod G of copy e div G."""
        first = self.shared + expert % self.granularity * self.slice_width
        return slice(first, first + self.slice_width)


def channels_of(model: TransformerConfig, granularity: int) -> Channels:
    """Return the channels of the upcycled ``model``."""
    shared = model.moe_shared_expert_intermediate_size or 0
    return Channels(shared, model.moe_ffn_size, granularity)


def fitting_problems(
    dense: TransformerConfig, model: TransformerConfig, granularity: int
) -> Iterator[str]:
    """Yield a sentence for each reason why ``model`` cannot grow out of ``dense``.

    Args:
        dense: Of the checkpoint.
        model: With experts; in a state in which it can be built.
        granularity: Slices of a copy.
    """
    if dense.num_moe_experts is not None:
        yield (
            f"the checkpoint has --num-experts {dense.num_moe_experts} already; only a dense model "
            "is upcycled (tools/checkpoint/experts.py clone copies experts)"
        )
        return
    if model.num_moe_experts is None:
        yield "upcycling needs --num-experts"
        return
    if model.mtp_depths and model.moe_layer_pattern[-1]:
        yield (
            f"--mtp-num-layers {model.mtp_num_layers}: the layers of multi-token prediction are as "
            "the last one, and are not upcycled yet; give --moe-layer-freq a last entry of 0"
        )
    then, now = architecture(dense), architecture(model)
    for flag in [f for f in now if f.startswith(("--moe-", *_NEW))]:
        del now[flag]
    yield from architecture_problems(then, now)
    yield from preservation_problems(model, granularity)
    yield from _width_problems(dense.ffn_size, model, granularity)


def _width_problems(width: int, model: TransformerConfig, granularity: int) -> Iterator[str]:
    channels = channels_of(model, granularity)
    if channels.total != width:
        routed = width - channels.shared
        fits = routed > 0 and routed % granularity == 0
        minus = f" - --moe-shared-expert-intermediate-size {channels.shared}"
        left = f"{width}{minus if channels.shared else ''}"
        text = f"the MLP of the checkpoint has --ffn-hidden-size {left} channels for the experts"
        if fits:
            yield (
                f"{text}: with --moe-upcycling-granularity {granularity} give "
                f"--moe-ffn-hidden-size {routed // granularity}, not {channels.slice_width}"
            )
        else:
            yield f"{text}, which --moe-upcycling-granularity {granularity} cannot share out evenly"
    if not all(model.moe_layer_pattern) and model.ffn_size != width:
        yield (
            f"--ffn-hidden-size is {width} in the checkpoint and {model.ffn_size} in this run, "
            "which has dense layers too: give --moe-ffn-hidden-size for the experts"
        )


def upcycled_config(
    dense: RunConfig, values: Mapping[str, Any], granularity: int, *, fold: bool = False
) -> RunConfig:
    """Return the configuration of the upcycled model.

    Args:
        dense: Of the checkpoint.
        values: Options of MoE layers, by field name, of ``MOE_OPTIONS``.
        granularity: Slices of a copy.
        fold: Leave --moe-router-topk-scaling-factor at 1; the second matrices take the factor.

    Raises:
        ConfigError: No such model can grow out of this one; all reasons are named.
    """
    assert set(values) <= MOE_OPTIONS, f"{set(values) - MOE_OPTIONS} are no options of MoE layers"
    if dense.model.num_moe_experts is not None:
        ConfigError.raise_if_any(fitting_problems(dense.model, dense.model, granularity))
    new = copy.deepcopy(dense)
    model = new.model
    for name, value in values.items():
        setattr(model, name, value)
    if model.moe_num_experts_per_layer:
        model.num_moe_experts = max(model.moe_num_experts_per_layer)
    if model.moe_router_topk_per_layer:
        model.moe_router_topk = max(model.moe_router_topk_per_layer)
    routed = model.ffn_size - (model.moe_shared_expert_intermediate_size or 0)
    if "moe_ffn_hidden_size" not in values and routed > 0 and routed % granularity == 0:
        model.moe_ffn_hidden_size = routed // granularity
    problems = [*model.moe_problems(), *model.layer_problems()]
    if not problems:
        problems += fitting_problems(dense.model, model, granularity)
    ConfigError.raise_if_any(problems)
    if not fold and model.moe_router_topk_scaling_factor is None:
        model.moe_router_topk_scaling_factor = factor_of_router(model, granularity)
    return new
