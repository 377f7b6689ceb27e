"""One microbatch of samples, as the data iterators hand it out."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron.core.sequence_slices import take_own


@dataclass(frozen=True)
class Batch:
    """Samples of one microbatch of one data-parallel rank: whole, or a slice of each sequence."""

    tokens: Tensor
    """[b, s] int64."""
    labels: Tensor
    """[b, s] int64: the next token of each position."""
    loss_mask: Tensor
    """[b, s] float32: 0 where a token does not count."""
    position_ids: Tensor
    """[b, s] int64."""
    attention_mask: Tensor | None
    """[b, 1, s, s] bool, True where a token may not attend; None for plain causal attention."""
    sample_ids: tuple[int, ...]
    """[b]: numbers of the samples in the global order; dropout masks depend on them."""
    padding_mask: Tensor | None = None
    """[b, s] bool, True where a token is padding; None when no sample has any. Samples of the
    data sets here have none; a data set of your own gives ``padding_mask`` [s] with a sample."""
    ahead_ids: Tensor | None = None
    """[b, s, D, 3]: see ``Ahead.ids``; None without multi-token prediction."""
    ahead_mask: Tensor | None = None
    """[b, s, D]: see ``Ahead.mask``."""

    @classmethod
    def of_samples(cls, samples: list[dict[str, Tensor]], sample_ids: tuple[int, ...]) -> "Batch":
        """Stack samples; those without a padding mask have no padding."""
        names = [field.name for field in fields(cls) if field.name != "sample_ids"]
        if any("padding_mask" in sample for sample in samples):
            none = torch.zeros_like(samples[0]["tokens"], dtype=torch.bool)
            samples = [{"padding_mask": none} | sample for sample in samples]
        stacked = {
            name: torch.stack([sample[name] for sample in samples]) if name in samples[0] else None
            for name in names
        }
        return cls(**stacked, sample_ids=sample_ids)  # type: ignore[arg-type]

    @property
    def num_depths(self) -> int:
        """Depths of multi-token prediction that it is made for."""
        return 0 if self.ahead_ids is None else self.ahead_ids.shape[2]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on ``device``; from pinned memory the copy does not wait."""
        tensors = {name: t.to(device, non_blocking=True) for name, t in self._tensors().items()}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def of_positions(self, rank: int, ranks: int) -> "Batch":
        """Return what one of ``ranks`` that share these sequences reads; see ``sequence_slices``.

        Its positions [b, s / ranks], and what those may look at, [b, 1, s / ranks, s].
        """
        slices = {
            name: take_own(tensor, rank, ranks, dim=2 if name == "attention_mask" else 1)
            for name, tensor in self._tensors().items()
        }
        return replace(self, **slices)  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the DataLoader calls this."""
        return replace(self, **{n: t.pin_memory() for n, t in self._tensors().items()})  # type: ignore[arg-type]

    def _tensors(self) -> dict[str, Tensor]:
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if isinstance(value, Tensor)}
