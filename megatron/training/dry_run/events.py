"""What a rank says to others, one event after the other: collectives, messages, waits. Pure.

An event names its group by the field of ``ProcessGroupCollection`` it came from, never by ranks:
so ranks that do the same thing at different places share one list of events.
"""

from typing import Literal, NamedTuple

Op = Literal[
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "barrier",
    "all_gather_object",
    "broadcast_object_list",
    "send",
    "recv",
]
MESSAGES = ("send", "recv")
"""Ops between two ranks; all others need every rank of their group."""

CallSite = tuple[str, ...]
"""``file:line in function``, from the call of torch.distributed outwards."""


class Post(NamedTuple):
    """A collective, or one end of a message, is started."""

    op: Op
    group: str
    """Name of the group; the ranks follow from the rank that posts."""
    ranks: int
    """Size of the group."""
    dtype: str
    elements: int
    """Elements that this rank brings; of a ``recv`` those it gets."""
    detail: str = ""
    """What else must agree, such as the kind of reduction."""
    send: tuple[int, ...] = ()
    """Of an ``all_to_all``: elements to each rank of the group."""
    recv: tuple[int, ...] = ()
    """Of an ``all_to_all``: elements from each rank of the group."""
    peer: int = -1
    """Of a message: place of the other end in the group."""
    itemsize: int = 1
    """Bytes of an element."""
    is_batched: bool = False
    """Of a message: one of a batch, whose messages may begin in any order."""
    site: CallSite = ()

    def agrees(self, other: "Post") -> bool:
        """Say whether two ranks may do this together (splits of an all-to-all left out)."""
        mine = (self.op, self.dtype, self.detail)
        if mine != (other.op, other.dtype, other.detail):
            return False
        return self.op == "all_to_all" or self.elements == other.elements

    def title(self) -> str:
        """Write ``all_reduce (sum) of 1,024 float32 over dp``."""
        kind = f" ({self.detail})" if self.detail else ""
        way = {"send": "to", "recv": "from"}.get(self.op)
        where = f"over {self.group}"
        if way is not None:
            where = f"{way} place {self.peer} of {self.group}"
        what = f" of {self.elements:,} {self.dtype}" if self.op != "barrier" else ""
        return f"{self.op}{kind}{what} {where}"

    def bytes_sent(self) -> int:
        """Return what this rank sends to others, by the usual ring algorithms.

        Of n bytes in a group of r ranks: an all-reduce 2 n (r - 1) / r, an all-gather of n own
        bytes n (r - 1), a reduce-scatter n (r - 1) / r; an all-to-all what goes to other ranks,
        its own block (at most the largest) left out.
        """
        size, others = self.elements * self.itemsize, self.ranks - 1
        if self.op == "all_reduce":
            return 2 * size * others // self.ranks
        if self.op == "reduce_scatter":
            return size * others // self.ranks
        if self.op == "all_to_all":
            return self.itemsize * sum(self.send) * others // self.ranks
        if self.op in ("all_gather", "all_gather_object"):
            return size * others
        return 0 if self.op in ("recv", "barrier") else size


class Wait(NamedTuple):
    """The rank goes on only when post number ``post`` of its list is complete."""

    post: int
    """Counts the posts of a rank from 0."""
    site: CallSite = ()


Event = Post | Wait
