"""What rules over a whole microbatch need of the ranks that share it; see MicrobatchShare."""

from typing import Protocol

from torch import Tensor


class TokenShare(Protocol):
    """An equal share of the tokens of one microbatch."""

    @property
    def ranks(self) -> int:
        """Shares of the microbatch."""

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the shares; no gradient."""

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all shares in the order of one process; no gradient."""

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows of this share of what ``gather`` gave."""
