"""What multi-token prediction reads of a batch, and where it leaves its losses.

Made of whole sequences, before ranks take their positions of them: the tokens that follow a
position may be another rank's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOKEN, POSITION, LABEL = range(3)
"""Places in the last dimension of ``Ahead.ids``."""


class Ahead(NamedTuple):
    """What each position sees of the D tokens behind the next one."""

    ids: Tensor
    """[b, s, D, 3] int64: at depth k, from 0, the token k + 1 ahead, its position and its label.
    Beyond the end of the sequence 0."""
    mask: Tensor
    """[b, s, D], in the dtype of the loss mask: 1 where the label counts."""


class LabelledTokens(NamedTuple):
    """What one depth reads, each [b, s]."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class AheadOfStep:
    """The losses of multi-token prediction in one microbatch."""

    ids: Tensor
    """See ``Ahead``, of this rank's positions."""
    mask: Tensor
    """See ``Ahead``."""
    weights: Tensor
    """[D]: of the sum of the losses of each depth, in the loss of the step."""
    sums: Tensor
    """[D] fp64: where the model leaves the sum of the losses that count, of each depth."""

    def at(self, depth: int) -> LabelledTokens:
        """Return what depth ``depth``, from 0, reads."""
        ids = self.ids[:, :, depth]
        return LabelledTokens(
            ids[..., TOKEN], ids[..., POSITION], ids[..., LABEL], self.mask[:, :, depth]
        )


def look_ahead(
    tokens: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    attention_mask: Tensor | None,
    *,
    depths: int,
) -> Ahead:
    """Return what each position sees ahead of itself; all arguments are of whole sequences.

    A label counts where it counts for the model itself and lies, as does every token between, in
    the document of the position: as far as positions that begin anew or an attention mask tell
    documents apart. Where a mask of the loss alone tells (--eod-mask-loss), the first token of a
    document counts nowhere, as it does not for the model.

    Args:
        tokens: [b, s].
        position_ids: [b, s].
        labels: [b, s].
        loss_mask: [b, s].
        attention_mask: bool [b, 1, s, s], True where a token may not look; None for none.
        depths: D.
    """
    document = _documents(position_ids, attention_mask)
    ids = torch.stack([tokens, position_ids, labels], dim=-1)  # [b, s, 3]
    seen, masks = [], []
    for step in range(1, depths + 1):
        seen.append(_shifted(ids, step))
        is_same = _shifted(document, step, beyond=-1) == document
        masks.append(_shifted(loss_mask, step) * is_same)
    return Ahead(torch.stack(seen, dim=2), torch.stack(masks, dim=2))


def _shifted(x: Tensor, step: int, *, beyond: int = 0) -> Tensor:
    """Return ``x`` [b, s, ...] with what is ``step`` further on at each position."""
    moved = torch.full_like(x, beyond)
    if step < x.shape[1]:
        moved[:, :-step] = x[:, step:]
    return moved


def _documents(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Number the documents of each sequence from 0, [b, s], as far as they are told apart."""
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None:  # a token that may not look at the one before
        begins[:, 1:] |= attention_mask[:, 0].diagonal(offset=-1, dim1=1, dim2=2).long()
    return begins.cumsum(dim=1)
