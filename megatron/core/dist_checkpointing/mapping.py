"""Which global keys a checkpoint holds: the tensors of model and optimizer, named without ranks.

    model.<name>                weights and persistent buffers
    optimizer.<state>.<name>    moments and fp32 main weights, shaped like the parameter
    rng.<rank>.<library>        random state of one rank (see rng_state.py)

Gate and up projection, which lie in one parameter, are two tensors: ``linear_fc1.gate.weight`` and
``linear_fc1.up.weight``. Experts are named by their global id, and slices by their place in the
whole tensor, so nothing here depends on the sizes of the parallel axes.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import attrgetter

from torch import Tensor, nn

from megatron.core.dist_checkpointing.tensor_shards import Storable, storable
from megatron.core.param_blocks import ParamBlocks, block_shards
from megatron.core.param_role import LogicalShard, ParamRole, Split, logical_shards, role_of

MODEL = "model."
OPTIMIZER = "optimizer."
RNG = "rng."

NamedWeights = Iterable[tuple[str, ParamRole, ParamBlocks]]
NamedState = Iterable[tuple[str, ParamRole, Mapping[str, Tensor | ParamBlocks]]]


def model_tensors(model: nn.Module, weights: NamedWeights | None = None) -> dict[str, Storable]:
    """Return views of the weights and persistent buffers of this rank, by global key.

    Args:
        model: Every parameter carries a ``ParamRole``.
        weights: (parameter name, role, the blocks of it that this rank keeps) of a model that is
            sharded; its parameters when None.
    """
    tensors: dict[str, Storable] = {}
    if weights is None:
        for name, param in model.named_parameters():
            _add_logical(tensors, MODEL, name, param.detach(), role_of(param))
    else:
        for name, role, part in weights:
            _add_blocks(tensors, MODEL, name, part, role)
    for name, buffer in _persistent_buffers(model):
        _add(tensors, MODEL + name, buffer)
    return tensors


def optimizer_tensors(named_state: NamedState) -> dict[str, Storable]:
    """Return views of the optimizer's tensors of this rank, by global key.

    Args:
        named_state: (parameter name, role, state name -> tensor shaped like the parameter, or the
            blocks of it that this rank keeps), as ``MegatronOptimizer.named_state`` yields.
    """
    tensors: dict[str, Storable] = {}
    for name, role, states in named_state:
        for state, tensor in states.items():
            prefix = f"{OPTIMIZER}{state}."
            if isinstance(tensor, ParamBlocks):
                _add_blocks(tensors, prefix, name, tensor, role)
            else:
                _add_logical(tensors, prefix, name, tensor.detach(), role)
    return tensors


def _add_logical(
    tensors: dict[str, Storable], prefix: str, name: str, tensor: Tensor, role: ParamRole
) -> None:
    _add_shards(tensors, prefix, logical_shards(name, tensor, role), role)


def _add_blocks(
    tensors: dict[str, Storable], prefix: str, name: str, part: ParamBlocks, role: ParamRole
) -> None:
    _add_shards(tensors, prefix, block_shards(name, part, role), role)


def _add_shards(
    tensors: dict[str, Storable], prefix: str, shards: Iterable[LogicalShard], role: ParamRole
) -> None:
    by_name = attrgetter("name")
    for key, found in groupby(sorted(_by_part(shards, role.split), key=by_name), by_name):
        _add(tensors, prefix + key, storable(found))


def _by_part(shards: Iterable[LogicalShard], split: Split | None) -> Iterator[LogicalShard]:
    """Cut blocks of a tensor of named parts, such as gate and up, into blocks of these."""
    for shard in shards:
        if split is None or not split.names:
            yield shard
            continue
        head, _, tail = shard.name.rpartition(".")
        dim, start = split.dim, 0
        first, last = shard.offset[dim], shard.offset[dim] + shard.tensor.shape[dim]
        for part, length in zip(split.names, split.parts, strict=True):
            low, high = max(first, start), min(last, start + length)
            if low < high:
                yield LogicalShard(
                    f"{head}.{part}.{tail}",
                    shard.tensor.narrow(dim, low - first, high - low),
                    (*shard.shape[:dim], length, *shard.shape[dim + 1 :]),
                    (*shard.offset[:dim], low - start, *shard.offset[dim + 1 :]),
                )
            start += length


def _add(tensors: dict[str, Storable], key: str, tensor: Storable) -> None:
    assert key not in tensors, f"two tensors are named {key}"
    tensors[key] = tensor


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
