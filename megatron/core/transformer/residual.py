"""What joins a branch to the residual stream: bias, dropout, factor, addition."""

from torch import Tensor

from megatron.core.tensor_parallel.random import SequenceShare
from megatron.core.transformer.forward_context import ForwardContext


def bias_dropout_add(
    branch: tuple[Tensor, Tensor | None],
    residual: Tensor,
    p: float,
    context: ForwardContext,
    *,
    layer: int,
    site: str,
    share: SequenceShare | None = None,
    multiplier: float = 1.0,
) -> Tensor:
    """Return residual + multiplier * dropout(output + bias), [s, b, h].

    Args:
        branch: Output [s, b, h] of attention or MLP, and a bias [h] not yet added, or None.
        residual: [s, b, h].
        p: Probability of dropping an element; without ``context.rng`` nothing is dropped.
        context: Gives the random numbers.
        layer: Global index of the layer.
        site: Name of the branch.
        share: Which share of the sequence this is; None for all of it.
        multiplier: Of what is added.
    """
    output, bias = branch
    if bias is not None:
        output = output + bias
    if context.rng is not None:
        output = context.rng.dropout(output, p, layer=layer, site=site, batch_dim=1, share=share)
    return residual.add(output, alpha=multiplier)  # at 1 the same kernel as a plain sum
