"""Several sources as one: sample n comes from the source that the blend says."""

from pathlib import Path

import numpy as np
from torch import Tensor

from megatron.core.datasets import index_cache
from megatron.core.datasets.blend import BlendIndices, BlendOrder, blend_indices
from megatron.core.datasets.gpt_dataset import SampleDataset
from megatron.core.datasets.splits import SplitName

_KEEP_FROM_SIZE = 1_000_000  # below this, computing is faster than files are worth


def load_blend_indices(
    weights: tuple[float, ...],
    size: int,
    *,
    order: BlendOrder,
    split: SplitName,
    cache_folder: Path | None,
) -> BlendIndices:
    """Return ``blend_indices(weights, size, order=order)``, from files when it is long."""
    description = {"class": "BlendedDataset", "weights": weights, "size": size, "order": order}
    folder = cache_folder if size >= _KEEP_FROM_SIZE else None
    arrays = index_cache.load_or_build(
        folder,
        f"BlendedDataset-{split}",
        description,
        lambda: blend_indices(weights, size, order=order)._asdict(),
    )
    return BlendIndices(**arrays)


class BlendedDataset:
    """Mixes data sets in the order of ``BlendIndices``."""

    def __init__(
        self,
        datasets: list[SampleDataset],
        indices: BlendIndices,
        *,
        weights: tuple[float, ...],
        order: BlendOrder,
    ) -> None:
        """Take data sets that hold every sample that ``indices`` asks of them.

        Args:
            datasets: The sources.
            indices: Of ``blend_indices(weights, size, order=order)``.
            weights: Share of each source.
            order: Rule of the blend. A longer blend begins like a shorter one of the same rule and
                weights, so its length is not part of the fingerprint.
        """
        self.datasets, self.indices = datasets, indices
        self.fingerprint = index_cache.description_digest(
            {
                "class": "BlendedDataset",
                "sources": [dataset.fingerprint for dataset in datasets],
                "weights": weights,
                "order": order,
            }
        )

    def describe(self, num_samples: int) -> str:
        """See ``SampleDataset.describe``."""
        read = self.indices.source_index[:num_samples]
        counts = np.bincount(read, minlength=len(self.datasets)).tolist()
        parts = [
            f"{count / max(num_samples, 1):.1%}: {dataset.describe(count)}"
            for dataset, count in zip(self.datasets, counts, strict=True)
        ]
        return f"{num_samples} samples; " + "; ".join(parts)

    def __len__(self) -> int:
        """Return the number of samples of the blend."""
        return len(self.indices.source_index)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """See ``GPTDataset.__getitem__``."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a blend of {len(self)}")
        source = self.datasets[int(self.indices.source_index[number])]
        return source[int(self.indices.source_sample_index[number])]
