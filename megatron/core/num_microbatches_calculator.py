"""How many microbatches make one optimizer step. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NumMicroBatches:
    """The split of a global batch over data-parallel ranks and microbatches.

    Raises:
        ConfigError: The global batch is no multiple of what all ranks compute at once.
    """

    global_batch_size: int
    """Samples of one optimizer step."""
    micro_batch_size: int
    """Samples that one rank computes at once."""
    data_parallel_size: int
    """Ranks that compute different samples."""

    def __post_init__(self) -> None:
        """Refuse what does not divide."""
        ConfigError.raise_if_any(self._problems())

    @property
    def count(self) -> int:
        """Microbatches that each rank computes in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def _problems(self) -> Iterator[str]:
        sizes = {
            "--global-batch-size": self.global_batch_size,
            "--micro-batch-size": self.micro_batch_size,
            "data-parallel size": self.data_parallel_size,
        }
        too_small = [
            f"{name} {size} must be at least 1" for name, size in sizes.items() if size < 1
        ]
        yield from too_small
        if too_small:
            return
        at_once = self.micro_batch_size * self.data_parallel_size
        if self.global_batch_size % at_once:
            below = self.global_batch_size // at_once * at_once
            near = f"{below} or {below + at_once}" if below else f"{at_once}"
            yield (
                f"--global-batch-size {self.global_batch_size} must be a multiple of "
                f"--micro-batch-size {self.micro_batch_size} x {self.data_parallel_size} "
                f"data-parallel ranks (= {at_once}); nearest: {near}"
            )
