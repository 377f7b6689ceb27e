"""Dropout masks and noise that depend on the sample, never on the rank or a global generator.

They are a function of (seed, sample number in the global order, layer, site). So a sample gets
the same in any layout, microbatch, accumulation or recompute, and nothing has to be saved.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.sequence_slices import take_own

_LEVELS = 1 << 16  # one 16-bit number decides about one element


class SequenceShare(NamedTuple):
    """Some positions of a sequence, dim 0 of activations.

    Those of one of ``cp_ranks`` (see ``sequence_slices``), and of these, in the order in which it
    holds them, an equal share.
    """

    rank: int
    """Which equal share."""
    ranks: int
    """Equal shares of what a context-parallel rank holds."""
    cp_rank: int = 0
    """Context-parallel rank."""
    cp_ranks: int = 1
    """Context-parallel ranks."""

    def whole(self, own: torch.Size) -> torch.Size:
        """Return the shape of the whole sequence, when that of the share is ``own``."""
        return torch.Size((own[0] * self.ranks * self.cp_ranks, *own[1:]))

    def of(self, whole: Tensor) -> Tensor:
        """Take the share of ``whole`` [length, ...]."""
        return take_own(whole, self.cp_rank, self.cp_ranks, dim=0).chunk(self.ranks)[self.rank]


def sequence_share(
    pg_collection: ProcessGroupCollection, sequence_parallel: bool
) -> SequenceShare | None:
    """Return this rank's share; None where every rank has the whole sequence."""
    tp, cp = pg_collection.tp, pg_collection.cp
    rank, ranks = (tp.rank(), tp.size()) if sequence_parallel else (0, 1)
    share = SequenceShare(rank, ranks, cp.rank(), cp.size())
    return share if share.ranks * share.cp_ranks > 1 else None


class SampleRng:
    """Draws the dropout masks and the noise of one microbatch."""

    def __init__(self, seed: int, sample_ids: tuple[int, ...]) -> None:
        """Remember what the masks depend on.

        Args:
            seed: Seed of the run.
            sample_ids: For each sample of the microbatch, its number in the global order.
        """
        self.seed = seed
        self.sample_ids = sample_ids

    def dropout(
        self,
        x: Tensor,
        p: float,
        *,
        layer: int,
        site: str,
        batch_dim: int,
        share: SequenceShare | None = None,
    ) -> Tensor:
        """Zero elements of ``x`` with probability ``p`` and scale the rest to keep the mean.

        Args:
            x: Any shape, with the samples of the microbatch along ``batch_dim``.
            p: In [0, 1); met to 1/65536, and the scale belongs to the rounded value.
            layer: Global index of the layer; -1 for the embedding.
            site: Names the place within the layer.
            batch_dim: Dimension of ``x`` that counts samples.
            share: Which positions dim 0 has; the mask is drawn for the whole sequence.
        """
        if p == 0.0:
            return x
        shape = x.shape if share is None else share.whole(x.shape)
        kept = self.kept(shape, p, layer=layer, site=site, batch_dim=batch_dim, device=x.device)
        out: Tensor = _Dropout.apply(x, _own(kept, share), keep_scale(p))
        return out

    def kept(
        self,
        shape: torch.Size,
        p: float,
        *,
        layer: int,
        site: str,
        batch_dim: int,
        device: torch.device,
    ) -> Tensor:
        """Return a bool mask of ``shape``, False where an element is dropped; see ``dropout``."""
        assert shape[batch_dim] == len(self.sample_ids), f"{shape=} {self.sample_ids=}"
        mask = torch.empty(shape, dtype=torch.bool, device=device)
        threshold = _threshold(p) - _LEVELS // 2  # of signed 16-bit numbers
        for i, generator in enumerate(self._generators(layer, site, device)):
            one = mask.select(batch_dim, i)
            torch.ge(_random_int16(one.shape, generator), threshold, out=one)
        return mask

    def jitter(
        self,
        x: Tensor,
        eps: float,
        *,
        layer: int,
        site: str,
        batch_dim: int,
        share: SequenceShare | None = None,
    ) -> Tensor:
        """Multiply each element of ``x`` by a number drawn evenly between 1 - eps and 1 + eps.

        The numbers have 65536 levels; the other arguments are those of ``dropout``.
        """
        assert x.shape[batch_dim] == len(self.sample_ids), f"{x.shape=} {self.sample_ids=}"
        factor = _whole_like(x, share)
        for i, generator in enumerate(self._generators(layer, site, x.device)):
            one = factor.select(batch_dim, i)
            one.copy_(_random_int16(one.shape, generator))
        factor = _own(factor, share)
        return x * factor.add_(0.5).mul_(2 * eps / _LEVELS).add_(1.0)

    def normal_like(
        self,
        x: Tensor,
        *,
        layer: int,
        site: str,
        batch_dim: int,
        share: SequenceShare | None = None,
    ) -> Tensor:
        """Return standard normal numbers shaped like ``x``; see ``dropout``."""
        assert x.shape[batch_dim] == len(self.sample_ids), f"{x.shape=} {self.sample_ids=}"
        drawn = _whole_like(x, share)
        for i, generator in enumerate(self._generators(layer, site, x.device)):
            one = drawn.select(batch_dim, i)
            # drawn apart: into a strided view, numbers would come in another order
            one.copy_(torch.randn(one.shape, generator=generator, device=x.device, dtype=x.dtype))
        return _own(drawn, share)

    def shared_normal(
        self, count: int, *, layer: int, site: str, step: int | None, like: Tensor
    ) -> Tensor:
        """Return ``count`` standard normal numbers that are the same for all samples.

        Args:
            count: Of numbers.
            layer: Global index of the layer.
            site: Names the place within the layer.
            step: Each has other numbers; None for the same in all steps.
            like: Of their dtype and device.
        """
        generator = torch.Generator(device=like.device)
        generator.manual_seed(_hash(f"{self.seed}/step {step}/{layer}/{site}"))
        return torch.randn(count, generator=generator, device=like.device, dtype=like.dtype)

    def _generators(self, layer: int, site: str, device: torch.device) -> Iterator[torch.Generator]:
        """Yield for each sample one generator, seeded anew."""
        generator = torch.Generator(device=device)
        for sample in self.sample_ids:
            generator.manual_seed(_hash(f"{self.seed}/{sample}/{layer}/{site}"))
            yield generator


def _whole_like(x: Tensor, share: SequenceShare | None) -> Tensor:
    """Return room for what ``x`` is a share of along dim 0, or for ``x`` when None."""
    return torch.empty_like(x) if share is None else x.new_empty(share.whole(x.shape))


def _own(whole: Tensor, share: SequenceShare | None) -> Tensor:
    return whole if share is None else share.of(whole)


def as_factor(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bool mask ``kept`` as zeros and ones.

    Multiplying by it is several times faster on a CPU than ``masked_fill``; so is converting from
    int8 than from bool.
    """
    return kept.view(torch.int8).to(dtype)


def keep_scale(p: float) -> float:
    """Return what kept elements are multiplied by: 1 / (1 - p), p rounded as masks round it."""
    return _LEVELS / (_LEVELS - _threshold(p))


def _threshold(p: float) -> int:
    assert 0.0 <= p < 1.0, f"a dropout probability must lie in [0, 1), not {p=}"
    return min(round(p * _LEVELS), _LEVELS - 1)


def _hash(key: str) -> int:
    """Return 63 well-mixed bits of ``key``."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def _random_int16(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw uniform int16 numbers, four from each 64-bit draw."""
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(shape)


class _Dropout(torch.autograd.Function):
    """Keeps the mask for backward, one byte an element."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale  # type: ignore[attr-defined]
        return as_factor(kept, x.dtype).mul_(scale).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors  # type: ignore[attr-defined]
        factor = as_factor(kept, grad.dtype).mul_(ctx.scale)  # type: ignore[attr-defined]
        return factor.mul_(grad), None, None
