"""Split a chain of parts into stages so that the most expensive stage costs least. Exact, pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron.core.transformer.attention_products import core_products, projection_products

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What each part of a model costs, in any one unit."""

    layers: tuple[float, ...]
    """Each transformer layer, in order."""
    embedding: float = 0.0
    head: float = 0.0
    """Final norm, output head and loss, and multi-token prediction, which is beside it."""
    mtp_num_layers: int = 0
    """Modules of multi-token prediction that ``head`` costs."""


def estimated_costs(config: "TransformerConfig", *, seq_length: int, vocab_size: int) -> LayerCosts:
    """Return the multiplications of one token's forward through each part.

    Matrix products as ``megatron.training.throughput.flops_per_token`` counts them: a MoE layer has
    its top-k and shared experts; an embedding looks up and adds one row.
    """
    hidden = config.hidden_size
    projections = projection_products(config)
    matrices = 3 if config.gated_linear_unit else 2
    dense = matrices * hidden * config.ffn_size
    moe = (
        matrices * config.moe_hidden_size * config.moe_router_topk * config.moe_ffn_size
        + matrices * hidden * (config.moe_shared_expert_intermediate_size or 0)
        + 2 * hidden * (config.moe_latent_size or 0)
    )
    layers = [
        projections
        + core_products(config, config.mean_keys_of(layer, seq_length))
        + (moe if is_moe else dense)
        for layer, is_moe in enumerate(config.moe_layer_pattern)
    ]
    ahead = config.mtp_depths * (layers[-1] + 2 * hidden * hidden + hidden * vocab_size)
    return LayerCosts(
        layers=tuple(map(float, layers)),
        embedding=float(hidden),
        head=float(hidden * vocab_size + ahead),
        mtp_num_layers=config.mtp_depths,
    )


def minimax_partition(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut ``costs`` into ``num_stages`` runs so that the largest sum of a run is least.

    Of all cuts with that largest sum, the one with the least sum of squares is taken, so that the
    other stages are even too; of those, the one whose first differing stage is longer.

    Args:
        costs: What each part costs, at least 0, in order.
        num_stages: Runs to make; each gets at least one part.

    Returns:
        ``num_stages + 1`` positions: stage ``s`` has the parts ``[result[s], result[s + 1])``.

    Raises:
        AssertionError: Fewer parts than stages, or no stage.
    """
    assert 1 <= num_stages <= len(costs), f"{len(costs)=} cannot fill {num_stages=}"
    up_to = [0, *accumulate(_whole(costs))]
    largest = _best(up_to, num_stages, limit=None)[0]
    cuts = _best(up_to, num_stages, limit=largest)[1]
    result = [0]
    for after in cuts:
        result.append(after[result[-1]])
    return tuple(result)


def _whole(costs: Sequence[float]) -> list[int]:
    """Scale to whole numbers without rounding: sums of floats would break ties by their error."""
    exact = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(cost.denominator for cost in exact))
    return [int(cost * scale) for cost in exact]


def _best(
    up_to: Sequence[int], num_stages: int, *, limit: int | None
) -> tuple[int, list[dict[int, int]]]:
    """Solve for every beginning, from the last stage to the first.

    With no ``limit`` the value of a cut is its largest stage, else the sum of squares of its
    stages, none of which may be above ``limit``.

    Returns:
        The least value of all; for each stage, where it ends if it begins at a position.
    """
    total = len(up_to) - 1
    value: dict[int, int] = {total: 0}  # of no stage: only nothing can be left
    ends: list[dict[int, int]] = []
    for left in range(1, num_stages + 1):
        before, value, end_of = value, {}, {}
        for begin in range(total - left + 1):
            for end in range(total - left + 1, begin, -1):
                cost = up_to[end] - up_to[begin]
                if end not in before or (limit is not None and cost > limit):
                    continue
                rest = before[end]
                candidate = max(cost, rest) if limit is None else cost * cost + rest
                if begin not in value or candidate < value[begin]:
                    value[begin], end_of[begin] = candidate, end
        ends.append(end_of)
    return value[0], ends[::-1]
