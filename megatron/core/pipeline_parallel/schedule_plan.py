"""Pipeline schedules as lists: in which order each rank computes. Pure, no torch.

One function for each schedule; ``build_schedule`` finds it by name. Sends and receives are not
here: schedule_transfers.py derives them. Expected memory and idle time: schedule_prediction.py.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.schedule_step import Schedule, Step, StepKind

SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zb-h2", "dualpipev")
"""Names that ``build_schedule`` takes."""


def build_schedule(
    name: str,
    *,
    pp: int,
    num_microbatches: int,
    vpp: int | None = None,
    group_size: int | None = None,
) -> Schedule:
    """Return the schedule called ``name``.

    Args:
        name: One of ``SCHEDULES``.
        pp: Pipeline ranks (``--pipeline-model-parallel-size``).
        num_microbatches: Microbatches of one optimizer step on this data-parallel rank.
        vpp: Chunks a rank holds (``--num-virtual-stages-per-pipeline-rank``). ``1f1b`` with
            several is ``interleaved``; the others have a number of their own, which None means.
        group_size: ``--microbatch-group-size-per-virtual-pipeline-stage`` of ``interleaved``:
            microbatches that go through a chunk before the next chunk's turn. None means ``pp``.

    Raises:
        ConfigError: An unknown name, or numbers that do not make a schedule; all problems at once.
    """
    ConfigError.raise_if_any(_problems(name, pp, num_microbatches, vpp, group_size))
    if name == "interleaved" or (vpp or 1) > _CHUNKS.get(name, 1):
        return interleaved(pp, num_microbatches, vpp=vpp or 1, group_size=group_size)
    return _BUILDERS[name](pp, num_microbatches)


def one_f_one_b(pp: int, num_microbatches: int) -> Schedule:
    """Return 1F1B: forwards to fill the pipeline, then one forward and one backward by turns.

    Source: Narayanan et al. 2021 (arXiv:2006.09503), PipeDream-Flush.
    """
    forwards = _all_microbatches("F", num_microbatches)
    backwards = [[step] for step in _all_microbatches("B", num_microbatches)]
    steps = tuple(_alternate(forwards, backwards, warmup=pp - 1 - rank) for rank in range(pp))
    return Schedule(name="1f1b", num_microbatches=num_microbatches, steps=steps)


def interleaved(
    pp: int, num_microbatches: int, *, vpp: int, group_size: int | None = None
) -> Schedule:
    """Return interleaved 1F1B: stage ``chunk * pp + rank`` is a rank's chunk number ``chunk``.

    ``group_size`` microbatches pass a chunk, then the same ones the next chunk. The last group is
    smaller where ``group_size`` does not divide ``num_microbatches``. Were it smaller than ``pp``,
    ranks could wait for each other for ever (Megatron refuses such counts): it is planned with
    ``pp`` microbatches, and the steps of those that do not exist are left out.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    group = group_size or pp
    rest = num_microbatches % group
    too_few = num_microbatches > group and 0 < rest < pp
    filled = num_microbatches + (pp - rest if too_few else 0)
    order = [
        (chunk, microbatch)
        for start in range(0, filled, group)
        for chunk in range(vpp)
        for microbatch in range(start, min(start + group, filled))
    ]
    forwards = [Step("F", microbatch, chunk) for chunk, microbatch in order]
    backwards = [[Step("B", microbatch, vpp - 1 - chunk)] for chunk, microbatch in order]
    steps = tuple(
        _first_microbatches(
            num_microbatches,
            _alternate(forwards, backwards, warmup=interleaved_warmup(pp, rank, vpp, group)),
        )
        for rank in range(pp)
    )
    return Schedule(name="interleaved", num_microbatches=num_microbatches, chunks=vpp, steps=steps)


def interleaved_warmup(pp: int, rank: int, vpp: int, group_size: int) -> int:
    """Return the forwards of ``rank`` before its first pair of a forward and a backward.

    The last rank must have brought the first microbatch through all its chunks but one; each rank
    before it is two steps ahead, for the way there and back.
    """
    return pp - 1 - rank if vpp == 1 else 2 * (pp - 1 - rank) + (vpp - 1) * group_size


def zero_bubble_h1(pp: int, num_microbatches: int) -> Schedule:
    """Return ZB-H1: 1F1B with weight gradients put off to where a rank would wait.

    Rank ``r`` is ``r`` weight gradients behind, which makes every rank keep what rank 0 of 1F1B
    keeps, ``pp`` microbatches.

    Source: Qi et al. 2023 (arXiv:2401.10241), section 2, handcrafted schedules.
    """
    return _zero_bubble("zb-h1", pp, num_microbatches, lead=1)


def zero_bubble_h2(pp: int, num_microbatches: int) -> Schedule:
    """Return ZB-H2: twice the forwards ahead and twice the weight gradients behind of ZB-H1.

    No rank waits once it has started, if forward, input and weight gradient take as long. That
    pays only where ranks need not end together: a global gradient norm makes them.

    Source: Qi et al. 2023 (arXiv:2401.10241), section 2, handcrafted schedules.
    """
    return _zero_bubble("zb-h2", pp, num_microbatches, lead=2)


def dual_pipe_v(pp: int, num_microbatches: int) -> Schedule:
    """Return DualPipeV: two chunks a rank in the shape of a V, so rank 0 has both ends.

    Forwards of one chunk stand next to backwards of the other, of another microbatch: the pairs in
    which the communication of one may hide behind the computation of the other. Fewer than
    ``2 * pp`` microbatches have less of that middle; other steps are as if there were enough, and
    those of missing microbatches are left out.

    Source: DeepSeek-AI 2024 (arXiv:2412.19437), section 3.2.1 (DualPipe); Qi et al. 2025,
    "DualPipe could be better without the Dual" (the cut in half).
    """
    steps = tuple(
        _first_microbatches(num_microbatches, _dual_pipe_v_rank(rank, pp, num_microbatches))
        for rank in range(pp)
    )
    return Schedule(
        name="dualpipev",
        num_microbatches=num_microbatches,
        chunks=2,
        v_shape=True,
        steps=steps,
    )


_BUILDERS: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "zb-h1": zero_bubble_h1,
    "zb-h2": zero_bubble_h2,
    "dualpipev": dual_pipe_v,
}
_CHUNKS = {"1f1b": 1, "zb-h1": 1, "zb-h2": 1, "dualpipev": 2}


def _problems(
    name: str, pp: int, num_microbatches: int, vpp: int | None, group_size: int | None
) -> Iterator[str]:
    if name not in SCHEDULES:
        yield f"schedule {name!r} is not known; there are {', '.join(SCHEDULES)}"
    sizes = {
        "the number of pipeline ranks": pp,
        "the number of microbatches": num_microbatches,
        "the number of virtual stages a rank": vpp,
        "the microbatch group size": group_size,
    }
    yield from (f"{what} is {n}, must be at least 1" for what, n in sizes.items() if _below(n, 1))
    own = _CHUNKS.get(name)
    if name != "1f1b" and own and vpp is not None and vpp != own:
        yield f"schedule {name} has {own} virtual stage(s) a rank, not {vpp}; 1f1b takes any number"
    if name == "interleaved" and (vpp or 1) == 1:
        yield "schedule interleaved needs at least 2 virtual stages a rank; with 1 it is 1f1b"
    if group_size is not None and (vpp or 1) == 1:
        yield f"the microbatch group size {group_size} needs at least 2 virtual stages a rank"
    elif group_size is not None and 1 <= group_size < pp:
        yield (
            f"the microbatch group size {group_size} must be at least the number of pipeline "
            f"ranks, {pp}: the first microbatch needs {pp} steps to come back to a rank"
        )


def _below(number: int | None, limit: int) -> bool:
    return number is not None and number < limit


def _all_microbatches(kind: StepKind, num_microbatches: int) -> list[Step]:
    return [Step(kind, microbatch) for microbatch in range(num_microbatches)]


def _first_microbatches(num_microbatches: int, steps: Iterable[Step]) -> tuple[Step, ...]:
    """Leave out later microbatches; the others never wait for them, so what ran still runs."""
    return tuple(step for step in steps if step.microbatch < num_microbatches)


def _alternate(
    forwards: Sequence[Step], backwards: Sequence[Sequence[Step]], *, warmup: int
) -> tuple[Step, ...]:
    """Do ``warmup`` forwards, then a forward and a backward by turns, then what is left."""
    steps = list(forwards[:warmup])
    for turn, backward in enumerate(backwards):
        steps += [*forwards[warmup + turn : warmup + turn + 1], *backward]
    return tuple(steps)


def _zero_bubble(name: str, pp: int, num_microbatches: int, *, lead: int) -> Schedule:
    """Go ``lead`` times as far ahead as 1F1B and stay ``lead * rank`` weight gradients behind."""
    forwards = _all_microbatches("F", num_microbatches)
    inputs = _all_microbatches("I", num_microbatches)
    weights = _all_microbatches("W", num_microbatches)
    steps = []
    for rank in range(pp):
        behind = lead * rank
        late: list[list[Step]] = [[]] * min(behind, num_microbatches) + [[w] for w in weights]
        backwards = [[i, *w] for i, w in zip(inputs, late, strict=False)]
        rest = weights[max(num_microbatches - behind, 0) :]
        steps.append((*_alternate(forwards, backwards, warmup=lead * (pp - 1 - rank)), *rest))
    return Schedule(name=name, num_microbatches=num_microbatches, steps=tuple(steps))


_Call = tuple[StepKind, int]
_F0: _Call = ("F", 0)
_F1: _Call = ("F", 1)
_B0: _Call = ("B", 0)
_B1: _Call = ("B", 1)
_I0: _Call = ("I", 0)
_I1: _Call = ("I", 1)
_OWED_W: _Call = ("W", -1)


def _dual_pipe_v_rank(rank: int, pp: int, num_microbatches: int) -> Iterator[Step]:
    """Yield the steps of ``rank``: phrases of (kind, chunk), each said some number of times."""
    after = pp - 1 - rank  # ranks between this one and the turn of the V
    # Nothing is left to send forward: of these, the later half sends its gradient before its W.
    returning = [_B1, _B0] * (rank + 1)
    returning[rank + 1 :] = [("I", chunk) for _, chunk in returning[rank + 1 :]]
    phrases: list[tuple[list[_Call], int]] = [
        ([_F0], 2 * after),  # down to the turn, and for the time of the way back
        ([_F0, _F1], rank + 1),
        ([_I1, _OWED_W, _F1], after),  # gradients come back, and are sent on before their W
        ([_F0, _B1, _F1, _B0], num_microbatches - 2 * pp + rank + 1),
        ([_B1, _F1, _B0], after),
        (returning, 1),
        ([_OWED_W, _I0], after),
        ([_OWED_W], rank + 1),
    ]
    forwards, backwards = (count(), count()), (count(), count())
    owed: deque[Step] = deque()
    for phrase, times in phrases:
        for kind, chunk in phrase * times:
            if kind == "W":
                yield owed.popleft()
                continue
            step = Step(kind, next((forwards if kind == "F" else backwards)[chunk]), chunk)
            if kind == "I":
                owed.append(Step("W", step.microbatch, chunk))
            yield step
