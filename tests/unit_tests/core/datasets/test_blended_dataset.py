from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets import blended_dataset
from megatron.core.datasets.blend import blend_indices
from megatron.core.datasets.blended_dataset import BlendedDataset, load_blend_indices


class Numbers:
    """Stands in for a data set: sample n holds (source, n)."""

    def __init__(self, source: int) -> None:
        self.source, self.fingerprint = source, f"source {source}"

    def describe(self, num_samples: int) -> str:
        return f"{num_samples} of source {self.source}"

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, number: int) -> dict:
        return {"from": (self.source, number)}


def blended(sources: list, weights: tuple[float, ...], size: int) -> BlendedDataset:
    indices = blend_indices(weights, size)
    return BlendedDataset(sources, indices, weights=weights, order="even")


def test_samples_come_from_the_source_that_the_blend_says() -> None:
    indices = blend_indices((0.5, 0.3, 0.2), 10)
    blend = blended([Numbers(0), Numbers(1), Numbers(2)], (0.5, 0.3, 0.2), 10)
    assert len(blend) == 10
    expected = list(zip(indices.source_index, indices.source_sample_index, strict=True))
    assert [blend[number]["from"] for number in range(10)] == expected
    for number in (-1, 10):
        with pytest.raises(IndexError, match="blend of 10"):
            blend[number]


def test_fingerprints_tell_other_blends_apart() -> None:
    sources = [Numbers(0), Numbers(1)]
    base = blended(sources, (0.5, 0.5), 10).fingerprint
    assert blended(sources, (0.5, 0.5), 20).fingerprint == base, "it begins the same"
    assert blended(sources, (0.8, 0.2), 10).fingerprint != base
    assert blended(sources[::-1], (0.5, 0.5), 10).fingerprint != base


def test_a_blend_tells_what_it_takes_from_each_source() -> None:
    text = blended([Numbers(0), Numbers(1)], (0.75, 0.25), 100).describe(40)
    assert text == "40 samples; 75.0%: 30 of source 0; 25.0%: 10 of source 1"


def test_long_blends_are_kept_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blended_dataset, "_KEEP_FROM_SIZE", 100)
    for size in (99, 100, 100):
        found = load_blend_indices(
            (0.7, 0.3), size, order="even", split="train", cache_folder=tmp_path
        )
        assert (found.source_index == blend_indices((0.7, 0.3), size).source_index).all()
    assert isinstance(found.source_index, np.memmap)
    assert len(list(tmp_path.glob("*-BlendedDataset-train-*.npy"))) == 2
