"""Play the lists of all ranks on a clock: when each step runs, how long ranks wait, who deadlocks.

Pure: no process, no tensor. It walks the very lists that an executor walks (``with_transfers``).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.core.pipeline_parallel.schedule_deadlock import Deadlock, Wait, find_deadlock
from megatron.core.pipeline_parallel.schedule_step import Product, Schedule, Step, StepKind
from megatron.core.pipeline_parallel.schedule_transfers import Action, Transfer, with_transfers

SendKind = Literal["buffered", "blocking"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times, in any one unit, of one microbatch through **all** layers of a rank.

    A chunk takes its share of it, so that schedules with different numbers of chunks compare.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    comm: float = 0.0
    """From the end of a step until another rank has its product."""

    @property
    def backward(self) -> float:
        """Time of a whole backward."""
        return self.input_grad + self.weight_grad

    def of(self, kind: StepKind) -> float:
        """Return the time of one kind of step."""
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.input_grad,
            "W": self.weight_grad,
        }[kind]


class Run(NamedTuple):
    """One step on the clock."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What happened, as far as it got."""

    runs: tuple[tuple[Run, ...], ...]
    """The steps of each rank, in time."""
    deadlock: Deadlock | None = None
    """Why it stopped early; None if every list was walked to its end."""

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end over all ranks."""
        return max((runs[-1].end for runs in self.runs if runs), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        return tuple(sum(run.end - run.start for run in runs) for runs in self.runs)

    @property
    def longest_span(self) -> float:
        """Time from the first start to the last end of the rank where that is longest."""
        return max((runs[-1].end - runs[0].start for runs in self.runs if runs), default=0.0)

    @property
    def bubble(self) -> float:
        """Share of rank time in which ranks compute nothing, if all must end together."""
        return self._idle_share(self.makespan)

    @property
    def bubble_unsynced(self) -> float:
        """The same, if each rank goes on to its next step of training when it is through.

        This is the figure of Qi et al. 2023; it holds where no global norm joins the ranks.
        """
        return self._idle_share(self.longest_span)

    def _idle_share(self, span: float) -> float:
        return 1.0 - sum(self.busy) / (span * len(self.runs)) if span else 0.0


class _Message(NamedTuple):
    product: Product
    time: float
    place: int


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    *,
    sends: SendKind = "buffered",
    actions: Sequence[Sequence[Action]] | None = None,
    stage_shares: Sequence[float] | None = None,
) -> Timeline:
    """Run all ranks' lists until they end or nobody can go on.

    Args:
        schedule: The steps, and where stages live.
        costs: Times of steps and messages; all steps take 1 if None.
        sends: ``buffered``: a send never waits, a receive waits where its product is needed (as
            isend and irecv). ``blocking``: both ends stand still until the message is over.
        actions: The lists, if other than ``with_transfers(schedule)``: a real program's, or a
            broken one.
        stage_shares: What each stage costs, in parts of a rank's layers; ``1 / chunks`` if None.

    Raises:
        AssertionError: ``stage_shares`` has not one number for each stage.
    """
    shares = stage_shares or [1 / schedule.chunks] * schedule.num_stages
    assert len(shares) == schedule.num_stages, f"{len(shares)=} is not {schedule.num_stages=}"
    lists = with_transfers(schedule) if actions is None else actions
    play = _Play(schedule, costs or Costs(), lists, shares)
    advance = play.buffered if sends == "buffered" else play.blocking
    moved = True
    while moved:
        moved = False
        for rank in range(schedule.pp):
            while advance(rank):
                moved = True
    return Timeline(
        runs=tuple(tuple(runs) for runs in play.runs),
        deadlock=play.mismatch
        or find_deadlock({rank: play.wait(rank) for rank in play.unfinished()}),
    )


class _Play:
    """The state of a simulation: where each rank stands, and its clock."""

    def __init__(
        self,
        schedule: Schedule,
        costs: Costs,
        lists: Sequence[Sequence[Action]],
        shares: Sequence[float],
    ) -> None:
        self.schedule, self.costs, self.lists, self.shares = schedule, costs, lists, shares
        self.at = [0] * len(lists)
        self.clock = [0.0] * len(lists)
        self.runs: list[list[Run]] = [[] for _ in lists]
        # What each rank has made or received, and since when.
        self.has: list[dict[Product, float]] = [{} for _ in lists]
        # Messages of a pair (sender, receiver): the n-th sent is the n-th received.
        self.sent: defaultdict[tuple[int, int], list[_Message]] = defaultdict(list)
        self.asked: defaultdict[tuple[int, int], list[_Message]] = defaultdict(list)
        self.mismatch: Deadlock | None = None

    def unfinished(self) -> list[int]:
        """Return the ranks that are not at the end of their lists."""
        return [rank for rank, own in enumerate(self.lists) if self.at[rank] < len(own)]

    def head(self, rank: int) -> Action | None:
        """Return what ``rank`` does next; None at the end of its list."""
        own, at = self.lists[rank], self.at[rank]
        return own[at] if at < len(own) else None

    def buffered(self, rank: int) -> bool:
        """Do the next action of ``rank`` if it can; transfers only start here."""
        action = self.head(rank)
        if action is None or self.mismatch:
            return False
        if isinstance(action, Step):
            return self._step(rank, action)
        if action.direction == "send" and action.product not in self.has[rank]:
            return False
        box, pair = (
            (self.sent, (rank, action.peer))
            if action.direction == "send"
            else (self.asked, (action.peer, rank))
        )
        box[pair].append(_Message(action.product, self.clock[rank], self.at[rank]))
        self.at[rank] += 1
        self._deliver(pair, len(box[pair]) - 1)
        return True

    def blocking(self, rank: int) -> bool:
        """Do the next action of ``rank`` if it can; a transfer moves both of its ranks on."""
        action = self.head(rank)
        if action is None or isinstance(action, Step):
            return action is not None and self._step(rank, action)
        other = {"send": "recv", "recv": "send"}[action.direction]
        if self.head(action.peer) != (other, rank, action.product):
            return False
        sender, receiver = (
            (rank, action.peer) if action.direction == "send" else (action.peer, rank)
        )
        if action.product not in self.has[sender]:
            return False
        end = max(self.clock[rank], self.clock[action.peer]) + self.costs.comm
        self.has[receiver][action.product] = end
        for end_point in (sender, receiver):
            self.clock[end_point] = end
            self.at[end_point] += 1
        return True

    def wait(self, rank: int) -> Wait:
        """Say what ``rank``, which cannot go on, stands at, and for whom."""
        action = self.head(rank)
        assert action is not None, f"rank {rank} is through"
        if isinstance(action, Transfer):
            if action.direction == "send" and action.product not in self.has[rank]:
                return Wait(rank, self.at[rank], action, rank, "it is not made yet")
            why = f"rank {action.peer} is not at its end of this message"
            return Wait(rank, self.at[rank], action, action.peer, why)
        missing = next(p for p in self.schedule.needs(rank, action) if p not in self.has[rank])
        maker = self.schedule.home(missing.stage).rank
        pair = (maker, rank)
        if any(message.product == missing for message in self.sent[pair]):
            maker = rank  # it was sent, and this rank did not ask for it
        return Wait(rank, self.at[rank], action, maker, f"needs {missing}")

    def _step(self, rank: int, step: Step) -> bool:
        needs = self.schedule.needs(rank, step)
        if not all(product in self.has[rank] for product in needs):
            return False
        start = max([self.clock[rank], *(self.has[rank][product] for product in needs)])
        share = self.shares[self.schedule.stage(rank, step.chunk)]
        end = start + self.costs.of(step.kind) * share
        self.runs[rank].append(Run(step, start, end))
        self.has[rank][self.schedule.makes(rank, step)] = self.clock[rank] = end
        self.at[rank] += 1
        return True

    def _deliver(self, pair: tuple[int, int], number: int) -> None:
        """Hand over message ``number`` of ``pair`` once it is both sent and asked for."""
        if number >= min(len(self.sent[pair]), len(self.asked[pair])):
            return
        sent, asked = self.sent[pair][number], self.asked[pair][number]
        if sent.product == asked.product:
            self.has[pair[1]][sent.product] = sent.time + self.costs.comm
            return
        sender, receiver = pair
        why = f"message {number} from rank {sender} to rank {receiver}"
        self.mismatch = Deadlock(
            (
                Wait(sender, sent.place, self.lists[sender][sent.place], receiver, why),
                Wait(receiver, asked.place, self.lists[receiver][asked.place], sender, why),
            ),
            "the two ends of one message are not the same product",
        )
