"""The experts of a token are a fixed function of its id: no learning, no balance to look after.

Pure tensor functions in int64 whose values stay below 2**63, so that nothing overflows and every
device and platform gives the same experts. The layer is part of the hash, the rank never.
"""

from typing import TypeVar

import torch
from torch import Tensor

from megatron.core.errors import ConfigError

Words = TypeVar("Words", int, Tensor)
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: keeps small numbers apart
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)


def ids_of_tokens(token_ids: Tensor | None, num_tokens: int) -> Tensor:
    """Return the id of each row of a router, [num_tokens], from ``ForwardContext.token_ids``.

    Args:
        token_ids: [b, s]; rows are position by position, the samples of each side by side.
        num_tokens: Rows, b * s.

    Raises:
        ConfigError: There are no ids, or not as many as rows.
    """
    if token_ids is None:
        raise ConfigError(
            "--moe-router-type hash needs the ids of the tokens: call the layer with "
            "ForwardContext(token_ids=input_ids), [b, s]; GPTModel does so itself"
        )
    if token_ids.numel() != num_tokens:
        raise ConfigError(
            f"--moe-router-type hash: ForwardContext.token_ids has shape {tuple(token_ids.shape)}, "
            f"which is not one id for each of the {num_tokens} tokens of the layer"
        )
    return token_ids.t().reshape(-1)  # [s*b]


def hash_map(token_ids: Tensor, num_experts: int, topk: int, layer: int) -> Tensor:
    """Return the routing map [num_tokens, num_experts], bool, with ``topk`` True in each row.

    Args:
        token_ids: [num_tokens], int64, any values.
        num_experts: Of the layer.
        topk: At most num_experts.
        layer: Global number of the layer: the same token goes to other experts in other layers.

    Source: Roller et al. 2021 (arXiv:2106.04426), random hash, with several hashes.
    """
    chosen = hashed_experts(token_ids, num_experts, topk, layer)
    empty = torch.zeros(len(token_ids), num_experts, dtype=torch.bool, device=chosen.device)
    return empty.scatter_(1, chosen, True)


def hashed_experts(token_ids: Tensor, num_experts: int, topk: int, layer: int) -> Tensor:
    """Return ``topk`` distinct experts of each token, [num_tokens, topk], int64.

    Slot j is drawn evenly from the num_experts - j experts that the slots before it left, by the
    hash of (id, layer, j): the first steps of a shuffle. A larger topk keeps the first slots.

    Args:
        token_ids: [num_tokens], int64.
        num_experts: Of the layer.
        topk: At most num_experts.
        layer: Global number of the layer.
    """
    left = torch.arange(num_experts, device=token_ids.device).repeat(len(token_ids), 1)
    for slot in range(topk):
        drawn = hash32(token_ids, layer, slot) % (num_experts - slot) + slot
        place = drawn.unsqueeze(1)  # [num_tokens, 1]
        picked = left.gather(1, place)
        left.scatter_(1, place, left[:, slot : slot + 1].clone())
        left[:, slot : slot + 1] = picked
    return left[:, :topk]


def hash32(token_ids: Tensor, layer: int, slot: int) -> Tensor:
    """Return 32 well-mixed bits of (id, layer, slot) for each id, int64 of the same shape.

    For a given layer and slot, ids below 2**32 never collide: each step can be undone.
    """
    key = _mix(_mix(layer + 1) ^ (slot * _GOLDEN & _MASK))
    low, high = token_ids & _MASK, (token_ids >> 32) & _MASK
    return _mix(_mix(low ^ key) ^ _times(high, _GOLDEN))


def _mix(x: Words) -> Words:
    """Mix 32-bit values so that each input bit changes each output bit half of the time.

    The finalizer of MurmurHash3 (A. Appleby, public domain).
    """
    first, second = _MULTIPLIERS
    x = _times((x ^ (x >> 16)) + 1 & _MASK, first)
    x = _times(x ^ (x >> 13), second)
    return x ^ (x >> 16)


def _times(x: Words, factor: int) -> Words:
    """Return x * factor modulo 2**32; in two halves, whose products stay below 2**49."""
    high = (x >> 16) * factor & 0xFFFF
    return (x & 0xFFFF) * factor + (high << 16) & _MASK
