"""ZeRO-3 by torch's ``fully_shard``: a rank keeps its part of weights, gradients and moments.

Rajbhandari et al. 2020 (arXiv:1910.02054), P_os+g+p. Gradients are plain sums: torch would divide
them by the number of ranks. Dense parameters are shared over ``dp_cp``, those of experts over
``expt_dp``. Easy to break: outside a forward parameters are DTensors, which few functions take.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from megatron.core.cpu_kernels.flat_buffers import fill_zero
from megatron.core.distributed.bucket_layout import BUFFER_ALIGNMENT, PARAM_ALIGNMENT, round_up
from megatron.core.distributed.data_parallel_base import DataParallelBase
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import main_dtype
from megatron.core.distributed.shard_units import Unit, block_along, shard_units, split_dim
from megatron.core.param_blocks import ParamBlocks
from megatron.core.param_role import ParamRole, deferred_init, role_of, set_role
from megatron.core.process_groups_config import ProcessGroupCollection

NamedWeight = tuple[str, ParamRole, ParamBlocks]
"""Name in the model, role, and what this rank keeps of it."""


class LocalShard(NamedTuple):
    """What this rank keeps of a trainable parameter."""

    name: str
    role: ParamRole
    shape: tuple[int, ...]
    """Of the parameter."""
    offset: tuple[int, ...]
    """Where the shard begins in it."""
    weight: Tensor
    """The shard, perhaps empty, in fp32 (fp64): the main weight."""
    gradient: Tensor
    """Sum of the gradients of the shard, alike."""


class TorchFullyShardedDataParallel(DataParallelBase):
    """A model of which every rank keeps a part; a unit is whole only while it computes.

    Units (see ``shard_units``) are gathered before they compute, forward and backward, in the
    number format of the model, from main weights in fp32 (fp64): there are no others. Gradients
    are reduced in fp32 (fp64) in *every* backward, for sums of several microbatches would
    otherwise be kept whole, and added up in the shard's ``main_grad``.
    """

    keeps_whole_parameters = False

    def __init__(
        self,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        *,
        pg_collection: ProcessGroupCollection,
        device: torch.device,
    ) -> None:
        """Move the parameters of ``module`` to ``device``, unit by unit, and keep this rank's part.

        Args:
            ddp_config: Whether layers are let go between forward and backward.
            module: The model, on any device; each of its parameters has a role (``set_role``) and
                all are of one dtype.
            pg_collection: ``dp_cp`` and ``expt_dp`` share parameters out.
            device: Of this rank, its current one.
        """
        super().__init__()
        self.module = module
        self.pg_collection = pg_collection
        self.is_sharded = True
        dtypes = {param.dtype for param in module.parameters()}
        assert len(dtypes) == 1, f"parameters of several number formats: {dtypes}"
        self.model_dtype = dtypes.pop()
        self.device = device
        roles = {name: role_of(param) for name, param in module.named_parameters()}
        self._units = [
            _shard(unit, self._mesh(unit), self.model_dtype, ddp_config)
            for unit in shard_units(module)
        ]
        self._params = list(module.named_parameters())  # replaced by shards, under the same names
        with deferred_init():
            for name, param in self._params:
                set_role(param, roles[name])
        self.grad_buffers: list[Tensor] = []
        """Flat sums of gradients of this rank's shards; padding is zero."""
        self.shards = tuple(self._keep_gradients())

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the model, DTensor) in registration order, each parameter once."""
        self.finish_param_sync()
        yield from ((name, param) for name, param in self._params if param.requires_grad)

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield nothing: no rank has a copy of another's shard."""
        yield from ()

    def layout_fingerprint(self) -> str:
        """See DataParallelBase.layout_fingerprint; names differ between ranks of other experts."""
        kept = [(tuple(param.shape), str(param.dtype)) for _, param in self._params]
        return hashlib.sha256(repr((kept, str(self.model_dtype))).encode()).hexdigest()

    def zero_grad_buffer(self) -> None:
        """See DataParallelBase.zero_grad_buffer."""
        for flat in self.grad_buffers:
            fill_zero(flat)

    def no_sync(self) -> AbstractContextManager[None]:
        """Change nothing: shards of gradients are summed over ranks in every microbatch."""
        return nullcontext()

    def finish_grad_sync(self) -> None:
        """Do nothing: a backward ends when its reductions are queued before what follows."""

    def start_param_sync(self) -> None:
        """Do nothing: units are gathered when they are called."""

    def finish_param_sync(self) -> None:
        """Let go of gathered weights, so that modules have their shards as parameters."""
        for unit in self._units:
            unit.reshard()

    def saved_weights(self) -> list[NamedWeight]:
        """Return what this rank keeps of each parameter, in the number format of the model.

        Views, if that is the format of main weights; else rounded copies (see ``take_weights``).
        """
        self.finish_param_sync()
        with torch.no_grad():
            return [
                (name, role_of(param), _blocks(param, _local(param).to(self.model_dtype)))
                for name, param in self._params
            ]

    @torch.no_grad()
    def take_weights(self, weights: Iterable[NamedWeight]) -> None:
        """Make what was written into the tensors of ``saved_weights()`` the main weights."""
        for (_, param), (_, _, part) in zip(self._params, weights, strict=True):
            for _, block in part.blocks:
                _local(param).copy_(block)

    def nonfinite_gradients(self) -> list[str]:
        """See DataParallelBase.nonfinite_gradients; collective over all ranks."""
        bad = torch.tensor(
            [int(not torch.isfinite(shard.gradient).all()) for shard in self.shards],
            dtype=torch.int32,
            device=self.device,
        )
        for is_expert, group in ((False, self._group(False)), (True, self._group(True))):
            here = [n for n, shard in enumerate(self.shards) if shard.role.is_expert == is_expert]
            counts = bad[here]
            dist.all_reduce(counts, group=group)
            bad[here] = counts
        return [s.name for s, count in zip(self.shards, bad.tolist(), strict=True) if count]

    def _group(self, is_expert: bool) -> ProcessGroup:
        return self.pg_collection.expt_dp if is_expert else self.pg_collection.dp_cp

    def _mesh(self, unit: Unit) -> DeviceMesh:
        return DeviceMesh.from_group(self._group(unit.is_expert), self.device.type)

    def _keep_gradients(self) -> Iterator[LocalShard]:
        """Give every shard a gradient that lasts, in one flat buffer for each kind of step."""
        members: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
        for name, param in self.trainable_parameters():
            role = role_of(param)
            members.setdefault((role.is_expert, role.decays), []).append((name, param))
        for kept in members.values():
            sizes = [round_up(_local(tensor).numel(), PARAM_ALIGNMENT) for _, tensor in kept]
            flat = torch.zeros(
                round_up(sum(sizes), BUFFER_ALIGNMENT),
                dtype=main_dtype(self.model_dtype),
                device=self.device,
            )
            self.grad_buffers.append(flat)
            start = 0
            for (name, tensor), size in zip(kept, sizes, strict=True):
                weight = _local(tensor)
                gradient = flat[start : start + weight.numel()].view(weight.shape)
                _set_gradient(tensor, gradient)
                shape, offset = tuple(tensor.shape), _offset(tensor)
                yield LocalShard(name, role_of(tensor), shape, offset, weight, gradient)
                start += size


def _shard(
    unit: Unit, mesh: DeviceMesh, dtype: torch.dtype, options: DistributedDataParallelConfig
) -> FSDPModule:
    """Keep this rank's part of the parameters of ``unit`` that are not shared out yet."""
    for param in unit.module.parameters():
        if not isinstance(param, DTensor):
            param.data = param.data.to(main_dtype(dtype))
    unit.module.register_forward_hook(lambda _, __, output: _no_view(output))  # before torch's
    for method in unit.methods:
        setattr(unit.module, method, _without_views(getattr(unit.module, method)))
    sharded = fully_shard(
        unit.module,
        mesh=mesh,
        reshard_after_forward=False if options.torch_fsdp2_no_reshard_after_forward else None,
        shard_placement_fn=_placement(mesh.size()) if unit.is_expert else None,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=main_dtype(dtype), cast_forward_inputs=False
        ),
    )
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    # a parameter that one rank uses and another does not must not skip a collective
    sharded.set_reduce_scatter_unused_params(True)
    for method in unit.methods:
        register_fsdp_forward_method(unit.module, method)
    return sharded


def _without_views(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _no_view(method(*args, **kwargs))


def _no_view(output: Any) -> Any:
    """Return ``output``, or a copy if it is a view.

    A change of a view in place would drop torch's hook on it, and the gather before backward.
    """
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _placement(ranks: int) -> Callable[[nn.Parameter], Shard]:
    return lambda param: Shard(split_dim(tuple(param.shape), ranks))


def _shared(param: Tensor) -> DTensor:
    assert isinstance(param, DTensor), "parameters are shards while nothing computes"
    return param


def _local(param: Tensor) -> Tensor:
    with torch.no_grad():
        return _shared(param).to_local()


def _offset(sharded: Tensor) -> tuple[int, ...]:
    """Return where this rank's shard begins in the parameter."""
    param = _shared(sharded)
    (placement,) = param.placements
    assert isinstance(placement, Shard), f"fully_shard placed a parameter {placement}"
    rank, ranks = param.device_mesh.get_local_rank(), param.device_mesh.size()
    start, end = block_along(param.shape[placement.dim], rank, ranks)
    length = _local(param).shape[placement.dim]
    assert length == end - start, f"a shard of {length} where {start=} {end=} is expected"
    return tuple(start if dim == placement.dim else 0 for dim in range(param.dim()))


def _blocks(param: Tensor, local: Tensor) -> ParamBlocks:
    blocks = ((_offset(param), local),) if local.numel() else ()
    return ParamBlocks(tuple(param.shape), blocks)


def _set_gradient(sharded: Tensor, local: Tensor) -> None:
    """Let reductions add to ``local``: torch adds to a gradient that is there."""
    param = _shared(sharded)
    gradient = DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    param.grad = gradient
    setattr(param, "main_grad", gradient)  # noqa: B010 (not an attribute of Tensor)
