"""Compare a MoE layer with a sum over all experts, weighted by a matrix a reference gives."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.reference.moe import ReferenceMoE
from tests.unit_tests.core.transformer.moe.layers import (
    H,
    logical_gradients,
    make_layer,
    make_reference,
    make_tokens,
    relative_error,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
VOCAB = 11
Z, SCALE = 0.02, 0.25
Weights = Callable[[Tensor, list[int]], Tensor]
"""(logits, token ids) -> weights [num_tokens, num_experts]."""


def token_ids(num_tokens: int, rank: int) -> Tensor:
    """Ids [1, num_tokens] of one sample."""
    generator = torch.Generator().manual_seed(500 + rank)
    return torch.randint(VOCAB, (1, num_tokens), generator=generator)


def dense_output(reference: ReferenceMoE, tokens: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, weighted; slow, and easy to check by eye."""
    parts = [weights[:, e : e + 1] * expert(tokens) for e, expert in enumerate(reference.experts)]
    return torch.stack(parts).sum(dim=0)


def check_layer(
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    sizes: tuple[int, ...],
    weights_of: Weights,
    *,
    training: bool = True,
) -> None:
    """Compare output and every gradient, the ranks having ``sizes`` tokens each.

    ``config.moe_z_loss_coeff`` is ``Z`` in training.
    """
    dtype, rank = getattr(torch, config.params_dtype_name), dist.get_rank()
    reference = make_reference(config)
    layer = make_layer(config, groups, reference).train(training)
    tokens = make_tokens(sizes[rank], dtype, rank)
    context = ForwardContext(aux_loss_scale=SCALE, token_ids=token_ids(sizes[rank], rank))
    output, _ = layer(tokens.view(sizes[rank], 1, H), context)
    output.square().sum().backward()
    for other, size in enumerate(sizes):
        inputs = make_tokens(size, dtype, other)
        logits = reference.gate(inputs)
        want = dense_output(
            reference, inputs, weights_of(logits, token_ids(size, other)[0].tolist())
        )
        z_loss = logits.logsumexp(dim=1).square().sum() / max(size, 1)
        (want.square().sum() + (SCALE * Z * z_loss if training else 0.0)).backward()
        if other == rank:
            assert relative_error(output.view(-1, H), want) <= TOLERANCE[dtype]
            assert relative_error(tokens.grad, inputs.grad) <= TOLERANCE[dtype]
    expected = reference.logical(gradients=True)
    for name, gradient in logical_gradients(layer, groups).items():
        error = relative_error(gradient, expected[name])
        assert error <= TOLERANCE[dtype], f"{name}: {error}"
