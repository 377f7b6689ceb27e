"""Proof that replicas hold the same weights and buffers, to the bit; nothing else compares them.

Each tensor becomes one 64-bit number, ranks compare numbers, and only a difference costs more. A
single wrong element always changes the number, and so do two exchanged ones of up to 32 bits.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core.collectives import all_gather_single
from megatron.core.distributed.data_parallel_base import DataParallelBase
from megatron.core.errors import MegatronError
from megatron.core.param_role import logical_tensors, role_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements hashed at once: their int64 copies take 64 MiB
_NAMES_SHOWN = 5


class ReplicaError(MegatronError):
    """Ranks that hold copies of a tensor do not hold the same bits."""


def check_replicas(ddp: DataParallelBase, *, iteration: int | None = None) -> None:
    """Compare every weight and every buffer that is saved, such as an expert bias.

    Collective over all ranks; sends 8 bytes a tensor.

    Args:
        ddp: The model.
        iteration: Steps made, for the message; None before the first, when weights were drawn or
            loaded.

    Raises:
        ReplicaError: On every rank, naming the tensors and ranks, if any rank differs in any bit,
            or in how its parameters are laid out.
    """
    _check_layouts(ddp)
    groups = ddp.pg_collection
    bad: dict[str, list[int]] = {}
    checks = [(dict(_on_both_ends(ddp)), groups.dp_cp_ends)]
    kinds = ((False, groups.dp_cp, groups.tp), (True, groups.expt_dp, groups.expt_tp))
    for is_expert, copies, slices in kinds:
        whole = dict(_replicated(ddp, is_expert, whole=True))
        checks += [(dict(_replicated(ddp, is_expert)), copies), (whole, slices)]
    for tensors, group in checks:
        for name, ranks in _differing(tensors, group).items():
            bad[name] = sorted({*bad.get(name, ()), *ranks})
    count = torch.tensor(len(bad), device=ddp.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=groups.world)
    if not count:
        return
    every: list[dict[str, list[int]]] = [{} for _ in range(groups.world.size())]
    dist.all_gather_object(every, bad, group=groups.world)
    raise ReplicaError(_message(_merged(every), iteration))


def tensor_hash(tensor: Tensor) -> Tensor:
    """Return a number, [] int64 on the device, that depends on every bit and place of ``tensor``.

    The sum of odd multiples (2 i + 1) of the elements' bits, modulo 2^64: integers, so the same in
    any order of summation.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        if flat.element_size() == 8:  # else x and -x, exchanged, would cancel out
            part = part ^ ((part >> 32) & 0xFFFFFFFF)
        place = torch.arange(start, start + len(part), device=tensor.device)
        total += place.mul_(2).add_(1).mul_(part).sum()
    return total


def _replicated(
    ddp: DataParallelBase, is_expert: bool, *, whole: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield (global name, tensor) of what is replicated alike: experts, or all the rest.

    With ``whole`` only what tensor-parallel ranks hold alike, too.
    """
    for name, param in ddp.replicated_parameters():
        role = role_of(param)
        if role.is_expert == is_expert and not (whole and role.split_over):
            yield from logical_tensors(name, param, role)
    if not is_expert:
        yield from _saved_buffers(ddp.module)


def _on_both_ends(ddp: DataParallelBase) -> Iterator[tuple[str, Tensor]]:
    """Yield what the first and the last stage of a pipeline hold a copy of each."""
    for name, param in ddp.trainable_parameters():
        role = role_of(param)
        if role.tied_ends == "apart":
            yield from logical_tensors(name, param, role)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = module.state_dict().keys()
    yield from (item for item in module.named_buffers() if item[0] in saved)


def _differing(tensors: dict[str, Tensor], group: ProcessGroup) -> dict[str, list[int]]:
    """Return name -> ranks of the world that differ from the first of ``group``, if any."""
    if group.size() == 1 or not tensors:
        return {}
    mine = torch.stack([tensor_hash(tensor) for tensor in tensors.values()])
    every = mine.new_empty(group.size() * len(mine))
    all_gather_single(every, mine, group=group)
    table = every.view(group.size(), -1).cpu()
    ranks = dist.get_process_group_ranks(group)
    return {
        name: [ranks[place] for place in unequal.nonzero().flatten().tolist()]
        for name, unequal in zip(tensors, (table != table[0]).t(), strict=True)
        if unequal.any()
    }


def _merged(every: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    names = dict.fromkeys(name for bad in every for name in bad)
    return {name: sorted({rank for bad in every for rank in bad.get(name, ())}) for name in names}


def _message(bad: dict[str, list[int]], iteration: int | None) -> str:
    shown = "; ".join(
        f"{name} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        for name, ranks in list(bad.items())[:_NAMES_SHOWN]
    )
    shown += "; ..." if len(bad) > _NAMES_SHOWN else ""
    if iteration is None:
        when = "before the first step"
        advice = "all ranks must start from the same --seed and the same checkpoint"
    else:
        when = f"after iteration {iteration}"
        advice = "this step is not saved; go back to an older checkpoint and check these ranks"
    return (
        f"replicas differ {when} in {len(bad)} tensor{'s' if len(bad) > 1 else ''}, from the first "
        f"rank that holds a copy: {shown}. {advice[0].upper()}{advice[1:]}"
    )


def _check_layouts(ddp: DataParallelBase) -> None:
    mine = ddp.pg_collection.pp.rank(), ddp.layout_fingerprint()
    world = ddp.pg_collection.world
    every: list[tuple[int, str]] = [mine] * world.size()
    dist.all_gather_object(every, mine, group=world)
    first_of_stage: dict[int, int] = {}
    for other, (stage, layout) in enumerate(every):
        first = first_of_stage.setdefault(stage, other)
        if layout == every[first][1]:
            continue
        raise ReplicaError(
            f"ranks {first} and {other} have models of different shapes (parameters, dtypes or "
            "bucket sizes); all ranks must run with the same options"
        )
