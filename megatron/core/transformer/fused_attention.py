"""Causal attention by PyTorch's own kernel, which knows neither windows nor sinks.

A window becomes a mask over pieces of the sequence, so that far keys are not multiplied; a sink
becomes one more key in front, which every query sees and whose value is zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.blocked_attention import BLOCK

_CHANNELS = 8
"""Channels that a sink adds to queries and keys; kernels want sizes in multiples of 8."""


def fused_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    weighting: Weighting,
    *,
    offset: int = 0,
) -> Tensor:
    """Attend without dropout and soft cap; see ``blocked_causal_attention``."""
    assert weighting.dropout is None, "this kernel drops no weights"
    assert weighting.softcap is None, "this kernel caps no scores"
    end = offset + query.shape[2]
    key, value = key[:, :, :end], value[:, :, :end]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :end]
    if weighting.first_seen(end - 1) == 0:  # no query's window ends before the first key
        return _attend(query, key, value, attention_mask, weighting._replace(window=None))
    outputs = []
    for rows, seen in _pieces(offset, end, weighting):
        hidden = None if attention_mask is None else attention_mask[:, :, rows, seen]
        outputs.append(
            _attend(query[:, :, rows], key[:, :, seen], value[:, :, seen], hidden, weighting)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _pieces(offset: int, end: int, weighting: Weighting) -> Iterator[tuple[slice, slice]]:
    """Yield some queries, and the keys they see: few enough that half of the products count."""
    assert weighting.window is not None, "without a window there is one piece"
    size = max(weighting.window + 1, BLOCK)
    for start in range(offset, end, size):
        stop = min(start + size, end)
        yield slice(start - offset, stop - offset), slice(weighting.first_seen(start), stop)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, weighting: Weighting
) -> Tensor:
    """Attend; the queries are the last of the positions that keys are of."""
    s, positions, scale, dv = query.shape[2], key.shape[2], weighting.scale, value.shape[-1]
    square = s == positions and attention_mask is None and weighting.window is None
    mask = None
    if not square and (s > 1 or attention_mask is not None):
        mask = _visible(s, positions, attention_mask, weighting, query.device)
    if weighting.sink is not None:
        scale = weighting.scale_of(query)
        query = _with_sink_channel(query, weighting.sink / scale, square)
        key = nn.functional.pad(key, (0, _CHANNELS, 1, 0))
        key[:, :, 0, -_CHANNELS] = 1.0
        value = nn.functional.pad(value, (0, _CHANNELS, 1, 0))
        mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out if weighting.sink is None else out[:, :, -s:, :dv]


def _with_sink_channel(query: Tensor, logits: Tensor, in_front: bool) -> Tensor:
    """Give queries a channel that is ``logits`` [heads], which only the sink's key multiplies.

    Args:
        query: [b, heads, s, d].
        logits: Before the scale of scores.
        in_front: Put a query of no position in front, at the place of the sink: the matrix is
            square again.

    Returns:
        [b, heads, s or s + 1, d + _CHANNELS].
    """
    channel = logits.to(query.dtype)[:, None, None].expand(*query.shape[:-1], 1)
    query = torch.cat([query, nn.functional.pad(channel, (0, _CHANNELS - 1))], dim=-1)
    return nn.functional.pad(query, (0, 0, 1, 0)) if in_front else query


def _visible(
    s: int,
    positions: int,
    attention_mask: Tensor | None,
    weighting: Weighting,
    device: torch.device,
) -> Tensor:
    """Return what each of the last ``s`` of ``positions`` may look at: bool [.., s, positions]."""
    past = torch.ones(s, positions, dtype=torch.bool, device=device).tril_(positions - s)
    if weighting.window is not None:
        past.triu_(positions - s - weighting.window)
    return past if attention_mask is None else past & ~attention_mask
