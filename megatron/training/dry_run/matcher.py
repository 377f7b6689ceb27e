"""Plays the events of all ranks and finds where they cannot go on together. Pure.

The rule is that of NCCL and gloo: in one group the n-th collective of every rank is one and the
same, and messages between two ranks arrive in the order they are sent. A post never blocks, a wait
does. So a step is sound if each rank reaches its end, and nothing is left over. NCCL asks for more:
it runs both directions of two ranks one after the other, but for batches.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.training.dry_run.events import MESSAGES, Event, Post, Wait

Groups = Mapping[str, Sequence[Sequence[int]]]
"""Name of a group -> its rank lists, which partition the ranks that have it. Groups of equal lists
are one, as ``ProcessGroupCollection.create`` makes them."""


class Standing(NamedTuple):
    """Where one rank stands."""

    rank: int
    post: Post | None
    """What it waits for, or has posted; None at its end."""
    awaits: tuple[int, ...] = ()
    """Ranks that have not come to it."""
    waited_at: tuple[str, ...] = ()
    """Call site of the wait, where that is not the post's."""


class Problem(NamedTuple):
    """Ranks that cannot go on."""

    kind: str
    """``different``: two ranks mean to do different things together; ``splits``: an all-to-all
    sends what is not expected; ``standstill``: ranks wait for each other; ``left over``: something
    was started that nobody joined."""
    standings: tuple[Standing, ...]
    """The ranks that show it; the first two are enough to see it."""
    blocked: int = 0
    """Ranks that stand still in all."""


class _Slot:
    """One collective of one group: who has come so far."""

    def __init__(self, first: Post, rank: int) -> None:
        self.first, self.first_rank = first, rank
        self.posts: dict[int, Post] = {}
        """Rank -> what it posted."""


class _Channel:
    """Collectives of one group, or messages of one pair of ranks, in order."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.next = dict.fromkeys(self.ranks, 0)
        self.slots: dict[int, _Slot] = {}
        self.complete = 0
        """All before this one are complete."""
        self.waiting: defaultdict[int, list[int]] = defaultdict(list)


_Key = tuple[str, int, int, int]
"""Group, which of its rank lists, and for messages sender and receiver (else -1, -1); the two ranks
in ascending order where both directions are one."""


class Matcher:
    """One play of all ranks; ``play`` may be called once."""

    def __init__(
        self, sequences: Sequence[Sequence[Event]], groups: Groups, *, is_nccl: bool = False
    ) -> None:
        self._events, self._is_nccl = sequences, is_nccl
        self._groups = groups
        self._list_of = {
            name: {rank: number for number, ranks in enumerate(lists) for rank in ranks}
            for name, lists in groups.items()
        }
        same: dict[tuple[tuple[int, ...], ...], str] = {}
        self._one_name = {
            name: same.setdefault(tuple(map(tuple, lists)), name) for name, lists in groups.items()
        }
        self._channels: dict[_Key, _Channel] = {}
        self._at = [0] * len(sequences)
        self._tickets: list[list[tuple[_Channel, int, Post]]] = [[] for _ in sequences]
        self._ready = deque(range(len(sequences)))
        self._blocked: dict[int, tuple[_Channel, int, Post, Wait]] = {}
        self._even: set[frozenset[int]] = set()
        """Identities of all-to-all posts that fit each other in any order."""

    def play(self) -> Problem | None:
        """Return the first problem found, or None if every rank gets to its end."""
        while self._ready:
            problem = self._run(self._ready.popleft())
            if problem is not None:
                return problem
        if self._blocked:
            return self._standstill()
        return self._left_over()

    def _run(self, rank: int) -> Problem | None:
        """Let ``rank`` go on until it must wait."""
        events, tickets = self._events[rank], self._tickets[rank]
        for at in range(self._at[rank], len(events)):
            event = events[at]
            if isinstance(event, Post):
                problem = self._post(rank, event)
                if problem is not None:
                    return problem
                continue
            channel, number, post = tickets[event.post]
            if channel.complete <= number:
                channel.waiting[number].append(rank)
                self._blocked[rank] = (channel, number, post, event)
                self._at[rank] = at + 1
                return None
        self._at[rank] = len(events)
        return None

    def _post(self, rank: int, post: Post) -> Problem | None:
        channel = self._channel(rank, post)
        number = channel.next[rank]
        channel.next[rank] = number + 1
        self._tickets[rank].append((channel, number, post))
        slot = channel.slots.get(number)
        if slot is None:
            slot = channel.slots[number] = _Slot(post, rank)
        elif slot.first is not post and not _fit(slot.first, post):
            pair = (Standing(slot.first_rank, slot.first), Standing(rank, post))
            return Problem("different", pair, 2)
        slot.posts[rank] = post
        if len(slot.posts) < len(channel.ranks):
            return None
        problem = self._splits_problem(channel, slot) if post.op == "all_to_all" else None
        del channel.slots[number]
        channel.complete = number + 1
        for woken in channel.waiting.pop(number, ()):
            del self._blocked[woken]
            self._ready.append(woken)
        return problem

    def _channel(self, rank: int, post: Post) -> _Channel:
        name = self._one_name[post.group]
        number = self._list_of[name][rank]
        ranks = self._groups[name][number]
        key = (name, number, -1, -1)
        if post.op in MESSAGES:
            ends = (rank, ranks[post.peer])
            if post.op == "recv":
                ends = (ends[1], ends[0])
            if self._is_nccl and not post.is_batched:
                ends = (min(ends), max(ends))
            key, ranks = (name, number, *ends), ends
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = _Channel(ranks)
        return channel

    def _splits_problem(self, channel: _Channel, slot: _Slot) -> Problem | None:
        posts = [slot.posts[rank] for rank in channel.ranks]
        kinds = frozenset(map(id, posts))
        if kinds in self._even:
            return None
        for i, sender in enumerate(posts):
            for j, receiver in enumerate(posts):
                if sender.send[j] != receiver.recv[i]:
                    ends = (channel.ranks[i], sender), (channel.ranks[j], receiver)
                    return Problem("splits", tuple(Standing(*end) for end in ends), 2)
        if len({size for post in posts for size in (*post.send, *post.recv)}) == 1:
            self._even.add(kinds)
        return None

    def _standing(self, rank: int) -> Standing:
        if rank not in self._blocked:
            return Standing(rank, None)
        channel, number, post, wait = self._blocked[rank]
        slot = channel.slots[number]
        missing = tuple(other for other in channel.ranks if other not in slot.posts)
        at = wait.site if wait.site != post.site else ()
        return Standing(rank, post, missing, at)

    def _standstill(self) -> Problem:
        """Follow who waits for whom until a rank comes again, or one that is at its end."""
        path = [min(self._blocked)]
        while True:
            standing = self._standing(path[-1])
            following = next((r for r in standing.awaits if r in path), min(standing.awaits))
            if following in path:
                shown = path[path.index(following) :]
                break
            path.append(following)
            if following not in self._blocked:
                shown = path[-2:]
                break
        return Problem("standstill", tuple(map(self._standing, shown)), len(self._blocked))

    def _left_over(self) -> Problem | None:
        for channel in self._channels.values():
            for slot in channel.slots.values():
                missing = tuple(rank for rank in channel.ranks if rank not in slot.posts)
                standings = (
                    Standing(slot.first_rank, slot.first, missing),
                    *(Standing(rank, None) for rank in missing[:1]),
                )
                return Problem("left over", standings, 0)
        return None


def _fit(first: Post, second: Post) -> bool:
    """Say whether two posts are ends of one message, or parts of one collective."""
    if first.op in MESSAGES and second.op in MESSAGES:
        kinds = {first.op, second.op} == set(MESSAGES)
        same = (first.dtype, first.elements) == (second.dtype, second.elements)
        return kinds and same
    return first.agrees(second)


def find_problem(
    sequences: Sequence[Sequence[Event]], groups: Groups, *, is_nccl: bool = False
) -> Problem | None:
    """Return the first place where ranks cannot go on together, or None.

    Args:
        sequences: Events of each rank; ranks that do the same may share one list.
        groups: Rank lists of every group that an event names.
        is_nccl: Two ranks must begin their messages to each other in one order, sends and receives
            together; batches apart.
    """
    return Matcher(sequences, groups, is_nccl=is_nccl).play()


def describe(problem: Problem, most: int = 4) -> list[str]:
    """Say what is wrong in lines of text; at most so many ranks are shown."""
    heads = {
        "different": "two ranks of one group mean to do different things together",
        "splits": "an all-to-all sends other sizes than its receiver expects",
        "standstill": f"{problem.blocked} ranks wait for each other and never go on",
        "left over": "a collective was started that some rank never joins",
    }
    lines = [f"DEADLOCK: {heads[problem.kind]}"]
    for standing in problem.standings[:most]:
        if standing.post is None:
            lines.append(f"  rank {standing.rank} is at the end of the step")
            continue
        lines.append(f"  rank {standing.rank}: {standing.post.title()}")
        lines += [f"      at {frame}" for frame in standing.post.site]
        lines += [f"      waiting at {frame}" for frame in standing.waited_at[:1]]
        if standing.awaits:
            others = ", ".join(map(str, standing.awaits[:8]))
            more = ", ..." if len(standing.awaits) > 8 else ""
            lines.append(f"      not there: rank {others}{more}")
    if len(problem.standings) > most:
        lines.append(f"  and {len(problem.standings) - most} more ranks in the circle")
    return lines
