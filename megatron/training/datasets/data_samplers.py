"""Which samples a data-parallel rank reads: a pure function of how many were consumed before.

Sample n of the global order is the same for every layout. The rank is only a place in each global
batch; no state is kept but the number of consumed samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Sample numbers of one rank, microbatch after microbatch.

    A global batch covers the next ``micro_batch_size * data_parallel_size * num_microbatches``
    numbers; its microbatch m covers ``micro_batch_size * data_parallel_size`` of them, in the
    order of the ranks.
    """

    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def microbatches(self, consumed_samples: int, total_samples: int) -> Iterator[tuple[int, ...]]:
        """Yield the sample numbers of each microbatch after ``consumed_samples``.

        Args:
            consumed_samples: Samples that all ranks together have read before.
            total_samples: Samples of the data set. Every rank ends at the same microbatch: the
                last one that is full on all of them.
        """
        all_ranks = self.micro_batch_size * self.data_parallel_size
        own = self.data_parallel_rank * self.micro_batch_size
        for start in range(consumed_samples, total_samples - all_ranks + 1, all_ranks):
            yield tuple(range(start + own, start + own + self.micro_batch_size))
