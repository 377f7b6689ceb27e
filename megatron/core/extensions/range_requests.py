"""Known ranges of a remote object as few large requests, and a stream over them. No packages.

What lies close together is asked for at once; what lies apart is not read. A few requests are under
way together, since one alone does not fill the line to a store.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

REQUEST_BYTES = 8 << 20
"""Largest request."""
GAP_BYTES = 64 << 10
"""Read and thrown away rather than asked for around: costs less than another request."""
AT_ONCE = 4
"""Requests under way together; so many times the largest is what a stream holds."""


class Request(NamedTuple):
    """Bytes that are asked for at once."""

    begin: int
    end: int
    """The first byte that is not asked for."""


def requests_for(
    ranges: Iterable[tuple[int, int]], *, most: int = REQUEST_BYTES, gap: int = GAP_BYTES
) -> list[Request]:
    """Cover ``ranges`` (begin, end) by requests, in ascending order.

    Args:
        ranges: In any order; empty ones are left out.
        most: Bytes of a request at most.
        gap: Ranges that are at most so far apart are covered together.
    """
    runs: list[list[int]] = []
    for begin, end in sorted(ranges):
        if begin == end:
            continue
        if runs and begin - runs[-1][1] <= gap:
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([begin, end])
    return [
        Request(at, min(at + most, end)) for begin, end in runs for at in range(begin, end, most)
    ]


class RangeStream(io.RawIOBase):
    """Reads what its requests cover; best from the front to the back.

    A request that brings less than it asked for ends the object there.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        fetch: Callable[[list[Request]], list[bytes]],
        *,
        at_once: int = AT_ONCE,
    ) -> None:
        """Nothing is asked for before it is read.

        Args:
            requests: In ascending order, apart.
            fetch: Returns the bytes of several requests.
            at_once: How many it is given at most.
        """
        super().__init__()
        self._requests, self._fetch, self._at_once = list(requests), fetch, at_once
        self._begins = [request.begin for request in self._requests]
        self._held: dict[int, bytes] = {}
        self._at = 0

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the beginning."""
        assert whence == io.SEEK_SET, f"{whence=}"
        self._at = offset
        return offset

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read what one request holds of the bytes from here; 0 at the end of the object."""
        number = bisect_right(self._begins, self._at) - 1
        if number < 0 or not len(buffer) or self._at >= self._requests[number].end:
            return 0
        piece = self._piece(number)
        start = self._at - self._begins[number]
        count = max(0, min(len(buffer), len(piece) - start))
        memoryview(buffer)[:count] = memoryview(piece)[start : start + count]
        self._at += count
        return count

    def _piece(self, number: int) -> bytes:
        if number not in self._held:
            wanted = range(number, min(number + self._at_once, len(self._requests)))
            self._held = {}  # let go before the next ones come
            pieces = self._fetch([self._requests[n] for n in wanted])
            self._held = dict(zip(wanted, pieces, strict=True))
        return self._held[number]
