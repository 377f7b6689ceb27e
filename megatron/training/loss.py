"""The language-model loss of one microbatch: a masked sum and the tokens it runs over.

Never a mean: a mean over one microbatch or rank would weigh tokens by where they happen to be.
"""

from typing import NamedTuple

from torch import Tensor


class MaskedLoss(NamedTuple):
    """What a script's ``loss_func`` returns."""

    loss_sum: Tensor
    """[], sum of the losses of unmasked tokens, with a gradient."""
    num_tokens: Tensor
    """[], number of unmasked tokens of this microbatch."""


def masked_loss(per_token_loss: Tensor, loss_mask: Tensor) -> MaskedLoss:
    """Sum the losses of the tokens that count.

    Args:
        per_token_loss: [b, s], fp32 or fp64.
        loss_mask: [b, s], 1 where a token counts and 0 where not.
    """
    return MaskedLoss((per_token_loss * loss_mask).sum(), loss_mask.sum())
