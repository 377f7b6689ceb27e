"""What a schedule should cost, by formula: activations kept and time idle. Pure.

Tests hold the lists to these numbers; where a formula does not reach (uneven stages, messages that
take time, few microbatches), schedule_simulator.py measures.
"""

from megatron.core.pipeline_parallel.schedule_plan import SCHEDULES, interleaved_warmup
from megatron.core.pipeline_parallel.schedule_simulator import Costs


def predicted_peak_activations(
    name: str,
    *,
    pp: int,
    num_microbatches: int,
    vpp: int = 1,
    group_size: int | None = None,
) -> tuple[int, ...]:
    """Return for each rank the most microbatches of a chunk that it keeps at once.

    Exact for 1F1B and zero-bubble; for ``interleaved`` where the last group of microbatches is
    full or has at least ``pp``; for ``dualpipev`` from ``2 * pp`` microbatches. Below those counts
    it is an upper bound. The unit is as in ``Schedule.peak_activations``.

    Source: Qi et al. 2023 (arXiv:2401.10241), section 2 (zero-bubble); DeepSeek-AI 2024
    (arXiv:2412.19437), section 3.2.1 (DualPipe, ``2 * pp`` stages: one more than there are).
    """
    _check(name)
    total = num_microbatches
    if name == "interleaved":
        group, total = group_size or pp, num_microbatches * vpp
        most = [interleaved_warmup(pp, rank, vpp, group) + 1 for rank in range(pp)]
    elif name == "1f1b":
        most = [pp - rank for rank in range(pp)]
    elif name == "zb-h1":
        most = [pp] * pp
    elif name == "zb-h2":
        most = [2 * pp - 1] * pp
    else:
        most, total = [2 * pp + 1] * pp, 2 * num_microbatches
    return tuple(min(own, total) for own in most)


def predicted_idle(name: str, *, pp: int, vpp: int = 1, costs: Costs | None = None) -> float:
    """Return the time that each rank waits in a step of training whose ranks end together.

    It is the same for any number of microbatches that fills the pipeline: any for ``1f1b``;
    multiples of ``pp`` in groups of ``pp`` for ``interleaved``; and, if a forward takes at least
    as long as a weight gradient, ``pp`` for ``zb-h1``, ``2 * pp - 1`` for ``zb-h2`` and
    ``2 * pp`` for ``dualpipev``. That one's is for pairs of a forward and a backward that run as
    one, as if nothing of a pair left before its end, where an input gradient takes at least as
    long as a forward; step by step it is less, half with even costs. Messages take no time here.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2; Qi et al. 2023
    (arXiv:2401.10241), section 2, where the last rank's late start, ``pp - 1`` forwards, is a
    bound for ranks that end together; DeepSeek-AI 2024 (arXiv:2412.19437), section 3.2.1.
    """
    _check(name)
    costs = costs or Costs()
    forward, grad, weight = costs.forward, costs.input_grad, costs.weight_grad
    each = {
        "1f1b": forward + costs.backward,
        "interleaved": (forward + costs.backward) / vpp,
        "zb-h1": max(forward, forward + grad - weight),
        "zb-h2": max(forward, forward + grad - 2 * weight),
        # F&B + B - 3 W of chunks, which have half of a rank's layers
        "dualpipev": (forward + 2 * costs.backward - 3 * weight) / 2,
    }
    return (pp - 1) * each[name]


def predicted_bubble(
    name: str, *, pp: int, num_microbatches: int, vpp: int = 1, costs: Costs | None = None
) -> float:
    """Return the share of time in which ranks wait; see ``predicted_idle`` for where it holds.

    With equal steps: (p-1)/(m+p-1) for 1F1B, (p-1)/(v*m+p-1) interleaved, (p-1)/(3*m+p-1) for
    ZB-H1.
    """
    costs = costs or Costs()
    idle = predicted_idle(name, pp=pp, vpp=vpp, costs=costs)
    return idle / (idle + num_microbatches * (costs.forward + costs.backward))


def _check(name: str) -> None:
    assert name in SCHEDULES, f"{name=} is none of {SCHEDULES}"
