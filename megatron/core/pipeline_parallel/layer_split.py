"""Which layers each pipeline stage holds, and which stage has embedding, norm, head and loss. Pure.

Where a stage lives is the schedule's business (``Schedule.home``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.layer_balance import LayerCosts, minimax_partition
from megatron.core.pipeline_parallel.layer_split_rules import (
    clashes,
    ends_text,
    layers_of_ranks,
    layout_problems,
    legal_ends,
    legal_even_splits,
    legal_units,
)
from megatron.core.pipeline_parallel.layout_string import FLAG, format_layout, parse_layout
from megatron.core.stage_layers import StageLayers

__all__ = ["SplitOptions", "StageLayers", "balanced_split", "layout_of", "split_layers"]


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Megatron's options of how layers are split; the names are its flags'."""

    num_layers: int
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None
    mtp_num_layers: int = 0

    @property
    def own_ends(self) -> bool:
        """The first or the last rank has its own number of layers."""
        ends = (self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers)
        return ends != (None, None)

    @property
    def extra_parts(self) -> int:
        """Of embedding and loss, how many count as a layer."""
        return (
            self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split
        )


def split_layers(options: SplitOptions) -> tuple[StageLayers, ...]:
    """Return what each stage holds, by Megatron's rules.

    Layers are split evenly; or the first and last rank have their own numbers and the others an
    even share; or as a layout string says. A rank's layers are split evenly over its chunks.

    Raises:
        ConfigError: The numbers do not divide, with the nearest that do; or options that exclude
            each other.
    """
    ConfigError.raise_if_any(clashes(vars(options)))
    if options.pipeline_model_parallel_layout is not None:
        return _from_layout(options)
    if options.own_ends:
        return _with_own_ends(options)
    return _evenly(options)


@lru_cache(maxsize=64)
def balanced_split(costs: LayerCosts, num_stages: int) -> tuple[StageLayers, ...]:
    """Split so that the most expensive stage costs least; embedding and head count as parts.

    A stage may come out without a transformer layer: a head may be worth one of its own.

    Raises:
        ConfigError: More stages than layers, embedding and head together.
    """
    parts = (costs.embedding, *costs.layers, costs.head)
    if num_stages > len(parts):
        raise ConfigError(
            f"{num_stages} stages cannot be filled: --num-layers {len(costs.layers)}, embedding "
            f"and output head make {len(parts)} parts; at most {len(parts)} stages"
        )
    cuts = minimax_partition(parts, num_stages)
    last = len(costs.layers)
    # Part 0 is the embedding, so that the parts [a, b) have the layers [a - 1, b - 1).
    ends = [min(max(cut - 1, 0), last) for cut in cuts]
    mtp = [0] * (num_stages - 1) + [costs.mtp_num_layers]
    return _stages([ends[s + 1] - ends[s] for s in range(num_stages)], mtp)


def layout_of(stages: tuple[StageLayers, ...]) -> str:
    """Write a split as a value of ``--pipeline-model-parallel-layout``."""
    return format_layout(stage.symbols() for stage in stages)


def _evenly(options: SplitOptions) -> tuple[StageLayers, ...]:
    layers, extra = options.num_layers, options.extra_parts
    pp = options.pipeline_model_parallel_size
    vpp = options.num_virtual_stages_per_pipeline_rank or 1
    per_stage = options.num_layers_per_virtual_pipeline_stage
    # Either the layers of a stage are given, or the stages of a rank.
    unit, what = (per_stage, "layers") if per_stage else (vpp, "virtual stages")
    given = per_stage or options.num_virtual_stages_per_pipeline_rank
    if (layers + extra) % (pp * unit):
        counted = f" + {extra} for embedding or loss = {layers + extra}" if extra else ""
        raise ConfigError(
            f"--num-layers {layers}{counted} must be a multiple of --pipeline-model-parallel-size "
            f"{pp} x {unit} {what} = {pp * unit}; legal: "
            f"{legal_even_splits(layers, extra, pp, unit)}"
            f"{legal_units(layers + extra, pp, unit, is_layers=bool(per_stage)) if given else ''}"
            f"; or say with {FLAG} what each stage has"
        )
    per_stage = per_stage or (layers + extra) // (pp * vpp)
    counts = [per_stage] * ((layers + extra) // per_stage)
    counts[0] -= options.account_for_embedding_in_pipeline_split
    counts[-1] -= options.account_for_loss_in_pipeline_split
    return _stages(counts, [0] * (len(counts) - 1) + [options.mtp_num_layers])


def _with_own_ends(options: SplitOptions) -> tuple[StageLayers, ...]:
    pp = options.pipeline_model_parallel_size
    vpp = options.num_virtual_stages_per_pipeline_rank or 1
    ends = (options.decoder_first_pipeline_num_layers, options.decoder_last_pipeline_num_layers)
    ranks = layers_of_ranks(options.num_layers, pp, vpp, ends)
    if ranks is None:
        raise ConfigError(
            f"{ends_text(ends)}: the other {options.num_layers - sum(filter(None, ends))} of "
            f"--num-layers {options.num_layers} must go evenly to the other "
            f"{pp - len([end for end in ends if end is not None])} of "
            f"--pipeline-model-parallel-size {pp} ranks, and each rank's layers to its {vpp} "
            f"virtual stage(s); legal: {legal_ends(options.num_layers, pp, vpp, ends)}"
        )
    counts = [rank // vpp for rank in ranks] * vpp
    return _stages(counts, [0] * (len(counts) - 1) + [options.mtp_num_layers])


def _from_layout(options: SplitOptions) -> tuple[StageLayers, ...]:
    text = options.pipeline_model_parallel_layout
    assert text is not None, "no layout to split by"
    stages = parse_layout(text)
    problems = layout_problems(
        stages,
        pp=options.pipeline_model_parallel_size,
        vpp=options.num_virtual_stages_per_pipeline_rank,
        num_layers=options.num_layers,
        mtp_num_layers=options.mtp_num_layers,
    )
    ConfigError.raise_if_any(f"{FLAG} {text!r} {problem}" for problem in problems)
    return _stages([s.count("t") for s in stages], [s.count("m") for s in stages])


def _stages(counts: Sequence[int], mtp: Sequence[int] = ()) -> tuple[StageLayers, ...]:
    """Number the layers of stages that have ``counts`` of them."""
    mtp = mtp or [0] * len(counts)
    final = len(counts) - 1
    # MTP layers read what the final norm made, so that it stands before them.
    norm = max((s for s in range(len(counts)) if counts[s]), default=final) if any(mtp) else final
    return tuple(
        StageLayers(
            embedding=stage == 0,
            layers=range(sum(counts[:stage]), sum(counts[: stage + 1])),
            final_norm=stage == norm,
            mtp_layers=range(sum(mtp[:stage]), sum(mtp[: stage + 1])),
            head=stage == final,
        )
        for stage in range(len(counts))
    )
