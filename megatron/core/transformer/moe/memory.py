"""What one MoE layer keeps between forward and backward: a formula, checked against the layer.

Bytes of tensors, not of the allocator; parameters, their gradients and what lives only for a moment
are left out. Recomputed parts keep nothing, see --recompute-granularity.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

_INDEX = 8
"""Bytes of an int64."""
_LOOP_ROWS = 16
"""expert_loop.py takes the rows of an expert in multiples of this."""


class SavedBytes(NamedTuple):
    """Bytes that one rank keeps for the backward of one MoE layer."""

    input: int
    """The tokens, once, for router and shared experts alike."""
    router: int
    """Routing map and probs; the logits, where a loss needs them."""
    dispatch: int
    """Where rows come from and go to, as indices; no row is kept."""
    experts: int
    """Rows as they arrived, their probs, and the output of the first matrix."""
    shared: int
    """Output of the first matrix and the activation of shared experts."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def saved_bytes(
    config: TransformerConfig,
    num_tokens: int,
    rows_per_expert: Sequence[int],
    *,
    ranks: int = 1,
    on_cpu: bool = False,
) -> SavedBytes:
    """Return what the layer keeps under ``--moe-token-dispatcher-type alltoall``.

    For experts of ``GroupedMLP`` without biases, a plain softmax router without capacity, latent
    space, z-loss or chunks, and at most the microbatch's balance loss.

    Args:
        config: Of the model.
        num_tokens: T, of this rank.
        rows_per_expert: Rows that each local expert of this rank receives.
        ranks: Of the expert-parallel group.
        on_cpu: There experts run one after another, unless --moe-grouped-mm-backend says
            otherwise, and wide or few rows of a token are summed where they lie.
    """
    assert config.num_moe_experts is not None, "a dense layer keeps what its MLP keeps"
    element = _bytes_of(config.params_dtype_name)
    wide = max(element, 4)  # probs, scores, losses
    experts, topk, hidden = config.num_moe_experts, config.moe_router_topk, config.hidden_size
    scores = num_tokens * experts * wide
    has_loss = bool(config.aux_loss_coeffs)
    sent, received = num_tokens * topk, sum(rows_per_expert)
    inner = config.moe_ffn_size * (2 if config.gated_linear_unit else 1)
    loops = on_cpu and config.moe_grouped_mm_backend == "auto"
    padded = [rows + -rows % _LOOP_ROWS for rows in rows_per_expert]
    first = sum(padded) if loops else received
    summed_in_place = on_cpu and (topk <= 2 or element >= 4)
    reordered = ranks > 1 and len(rows_per_expert) > 1
    return SavedBytes(
        input=num_tokens * hidden * element,
        router=num_tokens * experts + scores + (scores + experts * wide if has_loss else 0),
        dispatch=sent * 3 * _INDEX  # token and expert of each row, and its pair
        + (0 if summed_in_place else sent * _INDEX)  # rows of each token
        + (2 * received * _INDEX if reordered else 0),
        experts=received * (hidden * element + wide)
        + first * inner * element
        + (0 if loops else len(rows_per_expert) * _INDEX),
        shared=_shared_bytes(config, num_tokens, element),
    )


def _shared_bytes(config: TransformerConfig, num_tokens: int, element: int) -> int:
    width = config.moe_shared_expert_intermediate_size
    if width is None:
        return 0
    wide = max(element, 4)
    per_token = width * (3 if config.gated_linear_unit else 2) * element
    if config.moe_shared_expert_gate:  # the output and its factor, that one twice if it is narrowed
        per_token += config.hidden_size * element + wide + (element if element < wide else 0)
    return num_tokens * per_token


def _bytes_of(dtype: str) -> int:
    return {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}[dtype]
