"""What a dry run puts in the place of code that needs real numbers or real memory.

Routers choose evenly: token t has the experts t * topk, t * topk + 1, ... Fused kernels that read
memory are left out, and attention and experts take the way of the device that the run is for.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from megatron.core.extensions import torch_native
from megatron.core.transformer import dot_product_attention
from megatron.core.transformer.moe import permutation
from megatron.core.transformer.moe import router as router_module
from megatron.core.transformer.moe.expert_activation import IN_TORCH, _Scratch
from megatron.core.transformer.moe.experts import GroupedMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import setup_model
from megatron.training.dry_run.known_values import make_known

_LIKELY, _UNLIKELY = 4.0, -4.0


def even_logits(
    num_tokens: int, num_experts: int, topk: int, dtype: torch.dtype, expert_ranks: int = 1
) -> Tensor:
    """Return logits [num_tokens, num_experts] under which every expert has its share of tokens.

    Where experts cannot have equal shares, at least the ranks that hold them do, if they can: ranks
    that are not looked at are taken to get what the others get.
    """
    token, turn = torch.arange(num_tokens).unsqueeze(1), torch.arange(topk)
    chosen = (token * topk + turn) % num_experts
    of_rank = num_experts // expert_ranks
    uneven = num_tokens * topk % num_experts
    if uneven and topk <= of_rank and num_tokens % expert_ranks == 0:
        place = (token // expert_ranks * topk + turn) % of_rank
        chosen = token % expert_ranks * of_rank + place
    logits = torch.full((num_tokens, num_experts), _UNLIKELY, dtype=dtype)
    return logits.scatter_(1, chosen, _LIKELY)


@contextmanager
def stand_ins(device: str, expert_ranks: int = 1) -> Iterator[None]:
    """Put them in place inside the block.

    Args:
        device: ``cuda`` or ``cpu``: whose kernels are counted.
        expert_ranks: Ranks that experts are spread over.
    """
    with ExitStack() as stack:

        def put(target: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, new))

        put(TopKRouter, "_choose", _choosing_evenly(TopKRouter._choose, expert_ranks))
        put(router_module, "hash_map", partial(_hash_map, expert_ranks))
        put(GroupedMLP, "_activation", lambda *_: IN_TORCH)
        put(setup_model, "init_weights", lambda *_: None)
        put(nn.Module, "to", lambda module, *_: module)  # there already; fakes cannot be swapped
        put(logging.getLogger(setup_model.__name__), "disabled", True)
        if device == "cuda":
            put(dot_product_attention, "_blocked_is_faster", lambda *_: False)
            put(_Scratch, "_BLOCK_NUMEL", sys.maxsize)  # blocks are for the caches of a CPU
            put(permutation, "_CPU_TOKENS", sys.maxsize)
            fits = partial(_fits_without_data, torch_native._fits_grouped_mm)
            put(torch_native, "_fits_grouped_mm", fits)
        yield


def take_device_path(model: nn.Module, device: str) -> None:
    """Let experts take the way of ``device``: a grouped product, or a loop on a CPU."""
    for module in model.modules():
        if isinstance(module, GroupedMLP) and device == "cuda":
            module.loops_on_cpu = False


def _choosing_evenly(choose: Any, ranks: int) -> Any:
    def chosen(router: TopKRouter, logits: Tensor, context: Any) -> Any:
        with no_dispatch():
            num_tokens, num_experts = logits.shape
            value = even_logits(num_tokens, num_experts, router.topk, logits.dtype, ranks)
        make_known(logits, value)
        return choose(router, logits, context)

    return chosen


def _fits_without_data(fits: Callable[..., bool], rows: Tensor, *widths: int) -> bool:
    """Leave all but bf16 to a product for each expert: torch knows no other without data."""
    return rows.dtype == torch.bfloat16 and fits(rows, *widths)


def _hash_map(ranks: int, ids: Tensor, num_experts: int, topk: int, layer: int) -> Tensor:
    """Stand in for ``hash_map``: tokens of all ids in turn, hence evenly."""
    del layer
    with no_dispatch():
        value = even_logits(len(ids), num_experts, topk, torch.float32, ranks) > 0
    routing_map = torch.empty(value.shape, dtype=torch.bool, device=ids.device)
    make_known(routing_map, value)
    return routing_map
