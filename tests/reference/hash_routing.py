"""The hash of a token, in Python's whole numbers; nothing of megatron and no tensor arithmetic."""

import torch
from torch import Tensor

WORD = 2**32


def murmur_finalizer(x: int) -> int:
    """The last steps of MurmurHash3 on x + 1 folded once, modulo 2**32."""
    x = ((x ^ (x >> 16)) + 1) % WORD
    x = x * 0x85EBCA6B % WORD
    x ^= x >> 13
    x = x * 0xC2B2AE35 % WORD
    return x ^ (x >> 16)


def token_hash(token: int, layer: int, slot: int) -> int:
    """32 bits of (token, layer, slot); the token is a 64-bit word of two halves."""
    token %= 2**64
    key = murmur_finalizer(murmur_finalizer(layer + 1) ^ (slot * 0x9E3779B9 % WORD))
    low, high = token % WORD, token // WORD
    return murmur_finalizer(murmur_finalizer(low ^ key) ^ (high * 0x9E3779B9 % WORD))


def experts_of_token(token: int, num_experts: int, topk: int, layer: int) -> list[int]:
    """The first steps of a shuffle: slot j swaps with one of the places from j on."""
    left = list(range(num_experts))
    for slot in range(topk):
        place = slot + token_hash(token, layer, slot) % (num_experts - slot)
        left[slot], left[place] = left[place], left[slot]
    return left[:topk]


def hash_weights(logits: Tensor, token_ids: list[int], topk: int, layer: int) -> Tensor:
    """Softmax over the chosen logits of each token, [num_tokens, num_experts]."""
    rows = []
    for token, own in zip(token_ids, logits, strict=True):
        chosen = torch.tensor(experts_of_token(token, len(own), topk, layer))
        weights = torch.zeros_like(own)
        rows.append(weights.index_put((chosen,), own[chosen].softmax(dim=0)))
    return torch.stack(rows) if rows else logits
