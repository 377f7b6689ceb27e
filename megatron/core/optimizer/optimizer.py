"""The optimizer of a model in flat buffers: global norm, clipping, step, and state by parameter.

fp32 and fp64 models are stepped in place. bf16 and fp16 models have fp32 main weights, which are
stepped and then rounded into the model; the model's own weights are never read.

Sharded (ZeRO-1, Rajbhandari et al. 2020, arXiv:1910.02054), a rank keeps main weights and moments
of its slices of the buffers only, steps those, and takes the rest of the weights from their owners.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron.core.distributed.data_parallel_base import DataParallelBase, is_fully_sharded
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import ParamAndGradBuffer, main_dtype
from megatron.core.optimizer.base_optimizer import BaseOptimizer, NamedState, StepResult
from megatron.core.optimizer.clip_grads import (
    global_grad_norm,
    owned_gradients,
    sum_of_squares,
    sum_over_ranks,
)
from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.grad_scaler import GradScaler, build_grad_scaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import plan_param_groups
from megatron.core.optimizer.shard_layout import Piece, overlaps, owned_slices, whole_buffers
from megatron.core.param_blocks import ParamBlocks
from megatron.core.param_role import role_of
from megatron.core.process_groups_config import ProcessGroupCollection

__all__ = ["MegatronOptimizer", "NamedState", "StepResult", "get_megatron_optimizer"]


class MegatronOptimizer(BaseOptimizer):
    """Steps the flat buffers of a model; see BaseOptimizer."""

    def __init__(
        self,
        config: OptimizerConfig,
        ddp: DistributedDataParallel,
        *,
        pg_collection: ProcessGroupCollection,
        grad_scaler: GradScaler,
    ) -> None:
        """Make main weights and moments (zeros) for every trainable parameter of ``ddp``."""
        self.grad_scaler = grad_scaler
        self._ddp = ddp
        self._pg_collection = pg_collection
        self._pieces = _pieces(ddp)
        self._mains = [_main_tensor(ddp.grad_buffers[p.buffer], p) for p in self._pieces]
        groups = plan_param_groups([buffer.layout.key for buffer in ddp.grad_buffers])
        self._flat_step = FlatStep(
            config,
            [
                {
                    "params": [
                        main
                        for piece, main in zip(self._pieces, self._mains, strict=True)
                        if piece.buffer in group.buffers
                    ],
                    "wd_mult": group.wd_mult,
                    "lr_mult": group.lr_mult,
                    "weight_decay": config.weight_decay * group.wd_mult,
                }
                for group in groups
            ],
            {main: weights for weights, main in self._rounded()},
        )

    @torch.no_grad()
    def step(self) -> StepResult:
        """See BaseOptimizer.step."""
        self._ddp.finish_param_sync()
        result = self._clip_and_step(self._grad_norm())
        if result.update_successful:
            self._copy_main_to_model(but=self._flat_step.rounds)
        return result

    def named_state(self) -> Iterator[NamedState]:
        """See BaseOptimizer.named_state."""
        kept: dict[int, dict[str, Tensor | ParamBlocks]] = {}
        params = list(self._ddp.trainable_parameters())
        for piece, main in zip(self._pieces, self._mains, strict=True):
            buffer, flats = self._ddp.grad_buffers[piece.buffer], self._flat_step.moments(main)
            if main.dtype != buffer.param_data.dtype:
                flats["main_param"] = main
            for span, start, end in overlaps(piece, buffer.layout):
                shape = tuple(params[span.param][1].shape)
                kept[span.param] = {}
                for name, flat in flats.items():
                    part = flat[start - piece.start : end - piece.start]
                    is_whole = not self._ddp.is_sharded
                    kept[span.param][name] = (
                        part.view(shape)
                        if is_whole
                        else ParamBlocks.of_stretch(shape, start - span.start, part)
                    )
        for number, (name, param) in enumerate(params):
            yield NamedState(name, role_of(param), kept.get(number, {}))

    @torch.no_grad()
    def after_load(self, *, with_optim: bool = True) -> None:
        """See BaseOptimizer.after_load."""
        if with_optim:
            self._copy_main_to_model()
            return
        self._ddp.finish_param_sync()
        for weights, main in self._rounded():
            main.copy_(weights)

    def _grad_norm(self) -> Tensor:
        buffers = self._ddp.grad_buffers
        device = self._ddp.device
        if not self._ddp.is_sharded:
            gradients = ((buffer.layout.key, buffer.grad_data) for buffer in buffers)
            return global_grad_norm(owned_gradients(gradients, self._pg_collection), device)
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in buffers]
        for number, start, end in self._pieces:
            sums[number] = sums[number] + sum_of_squares(buffers[number].grad_data[start:end])
        whole = (
            (buffer.layout.key, sum_over_ranks(own, buffer.group))
            for buffer, own in zip(buffers, sums, strict=True)
        )
        owned = owned_gradients(whole, self._pg_collection)
        return global_grad_norm(owned, device, squares=lambda known: known)

    def _copy_main_to_model(self, *, but: Callable[[Tensor], bool] = lambda _: False) -> None:
        """Round main weights into the model, ``but`` those that are there already."""
        for weights, main in self._rounded():
            if not but(main):
                weights.copy_(main)
        self._ddp.start_param_sync()

    def _rounded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (weights of the model, their main weights) where they are two tensors."""
        for (number, start, end), main in zip(self._pieces, self._mains, strict=True):
            weights = self._ddp.grad_buffers[number].param_data[start:end]
            if main.dtype != weights.dtype:
                yield weights, main


def get_megatron_optimizer(
    optimizer_config: OptimizerConfig,
    ddp: DataParallelBase,
    *,
    pg_collection: ProcessGroupCollection,
    grad_scaler: GradScaler | None = None,
) -> BaseOptimizer:
    """Return the optimizer that the options ask for, over what ``ddp`` keeps.

    Args:
        optimizer_config: Kind and constants.
        ddp: The model, whose gradients are summed.
        pg_collection: Of this rank.
        grad_scaler: See BaseOptimizer; when None, that of a model that is not in fp16.
    """
    scaler = grad_scaler or build_grad_scaler(optimizer_config, fp16=False)
    groups = pg_collection
    if is_fully_sharded(ddp):
        from megatron.core.optimizer.fully_sharded_optimizer import FullyShardedOptimizer

        return FullyShardedOptimizer(
            optimizer_config, ddp, pg_collection=groups, grad_scaler=scaler
        )
    assert isinstance(ddp, DistributedDataParallel), f"{type(ddp)} has no optimizer"
    return MegatronOptimizer(optimizer_config, ddp, pg_collection=groups, grad_scaler=scaler)


def _pieces(ddp: DistributedDataParallel) -> list[Piece]:
    """Return what this rank steps: whole buffers, or its slice of every bucket."""
    if not ddp.is_sharded:
        return whole_buffers(ddp.bucket_layout.buffers)
    groups = [buffer.group for buffer in ddp.grad_buffers]
    return owned_slices(
        ddp.bucket_layout.buckets,
        [group.rank() for group in groups],
        [group.size() for group in groups],
    )


def _main_tensor(buffer: ParamAndGradBuffer, piece: Piece) -> Tensor:
    """Return what is stepped: the model's flat weights, or fp32 copies of narrower ones."""
    weights = buffer.param_data[piece.start : piece.end]
    same = main_dtype(weights.dtype) == weights.dtype
    main = weights if same else weights.to(buffer.grad_data.dtype)
    main.grad = buffer.grad_data[piece.start : piece.end]
    return main
