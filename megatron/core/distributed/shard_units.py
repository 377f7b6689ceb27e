"""Which parts of a model are sharded and gathered together, and which block a rank keeps.

A unit is gathered when it is called and let go afterwards, so it must be all that reads its
weights: tied embeddings, read at both ends of the model, stay with what is left over.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from megatron.core.param_role import role_of

_ENDS = {"embedding": (), "output_layer": ("loss",)}


class Unit(NamedTuple):
    """A module whose parameters, those of units in it left out, are gathered at once."""

    module: nn.Module
    is_expert: bool = False
    """Sharded over the ranks that hold the same experts, not over all data ranks."""
    methods: tuple[str, ...] = ()
    """Methods that compute, besides a call of the module."""


def shard_units(model: nn.Module) -> list[Unit]:
    """Return the units of ``model``, inner ones first, ``model`` itself last.

    They are: every bank of experts; every member of the outermost lists of modules, such as a
    layer; embedding and output layer, if each has a weight of its own; and the rest.
    """
    units = []
    for layer in _layers(model):
        banks = list(_expert_banks(layer))
        units += [Unit(bank, is_expert=True) for bank in banks]
        units += [Unit(layer)] if layer not in banks else []
    ends = {name: child for name, child in model.named_children() if name in _ENDS}
    if all(name in ends and any(True for _ in ends[name].parameters()) for name in _ENDS):
        units += [Unit(end, methods=_ENDS[name]) for name, end in ends.items()]
    return [*units, Unit(model)]


def split_dim(shape: tuple[int, ...], ranks: int) -> int:
    """Return the first dimension of an expert parameter that ``ranks`` share equally, else 0.

    Dimension 0 is of experts, often fewer than ranks; any other must be shared equally.
    """
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def block_along(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the elements [start, end) that ``rank`` of ``ranks`` keeps of a dimension.

    Blocks of ceil(size / ranks), the last ones shorter or empty, as ``torch.chunk`` cuts.
    """
    length = -(-size // ranks)
    return min(rank * length, size), min((rank + 1) * length, size)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from child.children()
        else:
            yield from _layers(child)


def _expert_banks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules in ``module`` that hold parameters of experts only."""
    if _is_expert_bank(module):
        yield module
        return
    for child in module.children():
        yield from _expert_banks(child)


def _is_expert_bank(module: nn.Module) -> bool:
    roles = [role_of(param) for param in module.parameters()]
    return bool(roles) and all(role.is_expert for role in roles)
