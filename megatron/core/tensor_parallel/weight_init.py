"""Initial weights that do not depend on the layout, and hashes to prove it.

Each logical tensor (one expert's matrix is one) is drawn from a generator of its own, seeded by
the run's seed and the tensor's global name: any rank draws the same values for the same tensor, all
of it, and keeps its slice.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

from megatron.core.param_role import Init, LogicalShard, draw_, logical_shards, role_of


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter of ``model`` by the ``init`` of its role.

    Draws are made on the CPU in fp32 and converted, so they are the same for each device, and
    equal up to rounding for each dtype. No global generator is used. One whole logical tensor is
    held at a time, beside the model.

    Args:
        model: Whole model, not wrapped: its parameter names are the global names.
        seed: Seed of the run.
    """
    with torch.no_grad():
        for name, param in model.named_parameters():
            role = role_of(param)
            for key, shards in groupby(logical_shards(name, param, role), lambda s: s.name):
                whole = None
                for shard in shards:
                    whole = _draw(key, shard.shape, role.init, seed) if whole is None else whole
                    shard.tensor.copy_(whole[shard.region])


def tensor_hashes(model: nn.Module) -> dict[str, str]:
    """Map the global name of each logical tensor of this rank to a hash of its bytes.

    With expert parallelism each rank has its own experts; the union over ranks is the same for any
    number of them. A slice of a tensor is named with its place: ``weight[0:8, 0:16]``.
    """
    return {_place(shard): _digest(shard.tensor) for shard in _logical_parameters(model)}


def _logical_parameters(model: nn.Module) -> Iterator[LogicalShard]:
    for name, param in model.named_parameters():
        yield from logical_shards(name, param.detach(), role_of(param))


def _place(shard: LogicalShard) -> str:
    if tuple(shard.tensor.shape) == shard.shape:
        return shard.name
    return f"{shard.name}[{', '.join(f'{r.start}:{r.stop}' for r in shard.region)}]"


def _draw(key: str, shape: tuple[int, ...], init: Init, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
    return draw_(drawn, init, generator)


def _digest(tensor: Tensor) -> str:
    data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()
