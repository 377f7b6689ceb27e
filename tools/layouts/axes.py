"""What a layout can differ in from one process, as options of pretrain_gpt.py. Pure.

Nothing here knows what is offered or legal: the rules of the configuration are asked for that.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Shape(NamedTuple):
    """What some options must be chosen by."""

    num_layers: int
    num_attention_heads: int
    micro_batch_size: int
    global_batch_size: int
    is_tied: bool = True
    """Whether embedding and output layer share their weight."""


class Level(NamedTuple):
    """One way of being different in one respect."""

    axis: str
    name: str
    words: tuple[str, ...]
    """Options, as typed."""
    sizes: Mapping[str, int]
    """Ranks along the axes of the grids: ``tp``, ``cp``, ``pp``, ``dp``, ``ep``, ``etp``."""
    needs: tuple[str, ...] = ()
    """Levels that stand in where their axis has none: this one means nothing without."""
    changes_model: bool = False
    """One process differs too: it is compared with one process that has these options."""


OWN = "yours"
"""Axis and level of the user's own flags: a row of its own, which goes with no other."""

Axes = dict[str, tuple[Level, ...]]
"""Axis -> its levels, the most telling first; of each axis a layout has one or none."""


# axis, name, options, ranks, needs
_SHARED = """
tp          | tp2             | --tensor-model-parallel-size 2                             | tp 2 |
tp          | tp4             | --tensor-model-parallel-size 4                             | tp 4 |
sp          | sp              | --sequence-parallel                                        |      | tp2
cp          | cp2-p2p         | --context-parallel-size 2 --cp-comm-type p2p               | cp 2 |
cp          | cp2-all_gather  | --context-parallel-size 2 --cp-comm-type all_gather        | cp 2 |
cp          | cp2-a2a         | --context-parallel-size 2 --cp-comm-type a2a               | cp 2 |
cp          | cp4-p2p         | --context-parallel-size 4 --cp-comm-type p2p               | cp 4 |
pp          | pp2             | --pipeline-model-parallel-size 2                           | pp 2 |
pp          | pp4             | --pipeline-model-parallel-size 4                           | pp 4 |
schedule    | interleaved     | --num-virtual-stages-per-pipeline-rank 2                   |      | pp2
schedule    | zb-h1           | --pipeline-schedule zb-h1                                  |      | pp2
schedule    | zb-h2           | --pipeline-schedule zb-h2                                  |      | pp2
schedule    | dualpipev       | --pipeline-schedule dualpipev                              |      | pp2
stages      | uneven          | --decoder-first-pipeline-num-layers 1                      |      | pp2
stages      | balanced        | --pipeline-model-parallel-layout auto                      |      | pp2
dp          | dp2             |                                                            | dp 2 |
dp          | dp4             |                                                            | dp 4 |
ep          | ep2             | --expert-model-parallel-size 2                             | ep 2 |
ep          | ep4             | --expert-model-parallel-size 4                             | ep 4 |
etp         | etp2            | --expert-tensor-parallel-size 2                            | etp 2 |
etp         | etp1            | --expert-tensor-parallel-size 1                            | etp 1 | tp2
dispatcher  | allgather       | --moe-token-dispatcher-type allgather                      |      | ep2
dispatcher  | dedup           | --moe-token-dispatcher-type alltoall_dedup                 |      | ep2
dispatcher  | two-hops        | --moe-token-dispatcher-type alltoall_hierarchical --moe-dispatcher-node-size 2 |  | ep4
sharding    | zero1           | --use-distributed-optimizer                                |      | dp2
sharding    | zero1-overlap   | --use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce --ddp-bucket-size 700 | | dp2
sharding    | zero3           | --use-torch-fsdp2                                          |      | dp2
overlap     | grad-reduce     | --overlap-grad-reduce --ddp-bucket-size 700                |      | dp2
overlap     | expert-comm     | --overlap-moe-expert-parallel-comm                         |      | ep2
recompute   | recompute-full  | --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 | |
recompute   | recompute-block | --recompute-granularity full --recompute-method block --recompute-num-layers 1 | |
recompute   | recompute-attn  | --recompute-granularity selective --recompute-modules core_attn | |
recompute   | recompute-moe   | --recompute-granularity selective --recompute-modules moe  |      |
"""  # noqa: E501 (a table)


def axes_for(shape: Shape, own: Level | None = None) -> Axes:
    """Return all axes, for a model of ``shape``; ``own`` is the layout that the user asked for."""
    levels = [_read(line) for line in _SHARED.strip().splitlines()] + _models(shape)
    levels += [] if own is None else [own]
    found: dict[str, list[Level]] = {}
    for level in levels:
        found.setdefault(level.axis, []).append(level)
    return {axis: tuple(levels) for axis, levels in found.items()}


def by_name(axes: Axes) -> dict[str, Level]:
    """Return the levels of all axes by their names, in the order of the axes."""
    return {level.name: level for levels in axes.values() for level in levels}


def completed(names: Iterable[str], axes: Axes) -> tuple[str, ...]:
    """Return the levels ``names`` and those that they need, in the order of the axes."""
    levels = by_name(axes)
    chosen = {levels[name].axis: name for name in names}
    todo = list(chosen.values())
    while todo:
        for needed in levels[todo.pop()].needs:
            if chosen.setdefault(levels[needed].axis, needed) == needed:
                todo.append(needed)
    return tuple(chosen[axis] for axis in axes if axis in chosen)


def sizes_of(names: Iterable[str], axes: Axes) -> dict[str, int]:
    """Return the ranks along each axis of both grids.

    Where no level says how many data ranks there are, as few as the expert grid needs.
    """
    levels = by_name(axes)
    sizes = {"tp": 1, "cp": 1, "pp": 1, "ep": 1}
    for name in names:
        sizes |= levels[name].sizes
    sizes.setdefault("etp", sizes["tp"])
    if "dp" not in sizes:
        dense, experts = sizes["tp"] * sizes["cp"], sizes["ep"] * sizes["etp"]
        sizes["dp"] = math.lcm(dense, experts) // dense
    return sizes


def world_size_of(names: Iterable[str], axes: Axes) -> int:
    """Return the ranks of a layout."""
    sizes = sizes_of(names, axes)
    return math.prod(sizes[axis] for axis in ("tp", "cp", "pp", "dp"))


def words_of(names: Iterable[str], axes: Axes, *, of_model: bool = False) -> list[str]:
    """Return the options of a layout; only those that change one process too if ``of_model``."""
    levels = by_name(axes)
    chosen = [levels[name] for name in names]
    return [word for level in chosen if level.changes_model or not of_model for word in level.words]


def _read(line: str) -> Level:
    axis, name, words, sizes, needs = (cell.strip() for cell in line.split("|"))
    ranks = dict([(sizes.split()[0], int(sizes.split()[1]))] if sizes else [])
    return Level(axis, name, tuple(words.split()), ranks, tuple(needs.split()))


def _models(shape: Shape) -> list[Level]:
    half = shape.num_layers // 2
    options = {
        "dense-first": ("model", f"--moe-layer-freq ([0]*{half}+[1]*{shape.num_layers - half})"),
        "untied": ("model", "--untie-embeddings-and-output-weights"),
        "shared-experts": (
            "model",
            "--moe-shared-expert-intermediate-size 16 --moe-shared-expert-overlap",
        ),
        "per-token": ("model", "--calculate-per-token-loss"),
        "groups": (
            "attention",
            f"--group-query-attention --num-query-groups {shape.num_attention_heads // 2}",
        ),
        "one-group": ("attention", "--group-query-attention --num-query-groups 1"),
        "rope": ("attention", "--position-embedding-type rope"),
        "two-batches": ("batch", f"--global-batch-size {2 * shape.global_batch_size}"),
    }
    if not shape.is_tied:
        del options["untied"]
    return [
        Level(axis, name, tuple(words.split()), {}, (), True)
        for name, (axis, words) in options.items()
    ]
