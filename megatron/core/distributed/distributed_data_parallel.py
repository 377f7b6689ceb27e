"""Data parallelism: gradients gather in flat buffers as backward makes them, and are summed.

Sums, not means: the loss is divided by the global number of tokens before backward. Dense
gradients are summed over ``dp_cp``, those of experts over ``expt_dp``. Every rank reduces every
bucket in every step, also when some of its parameters got no gradient (they count as zero).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from megatron.core.cpu_kernels.flat_buffers import fill_zero
from megatron.core.distributed.bucket_layout import (
    Bucket,
    BufferKey,
    ParamSpec,
    Span,
    default_bucket_size,
    plan_buckets,
)
from megatron.core.distributed.data_parallel_base import DataParallelBase
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.grad_reducer import GradReducer, Pending
from megatron.core.distributed.param_and_grad_buffer import ParamAndGradBuffer
from megatron.core.distributed.param_gatherer import ParamGatherer
from megatron.core.grad_sink import offer_grad_sink
from megatron.core.param_role import role_of
from megatron.core.process_groups_config import ProcessGroupCollection


class DistributedDataParallel(DataParallelBase):
    """A model whose parameters and gradients live in flat buffers, shared by data ranks.

    Every trainable parameter gets ``param.main_grad``, a view of fp32 (fp64) gradients that
    accumulates over backwards; ``param.grad`` stays None. A tied parameter is one parameter. A
    function may add to ``main_grad`` itself and return no gradient: see ``grad_sink_of``. It may
    do so after backward (``WeightGradQueue``): a bucket is reduced once the last backward went
    through its parameters and nothing of them is put off.

    One step: ``zero_grad_buffer()``; all microbatches but the last under ``no_sync()``, of each
    pipeline stage of this rank; the last one outside; ``finish_grad_sync()``. Then ``main_grad`` is
    the same on all replicas.

    With ``use_distributed_optimizer`` a rank gets the sums of its slice of each bucket only
    (``ParamAndGradBuffer.own``), and weights that it does not own from ``start_param_sync()``.
    """

    def __init__(
        self,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        *,
        pg_collection: ProcessGroupCollection,
        device: torch.device | str = "cpu",
    ) -> None:
        """Move the parameters of ``module``, which is on its device already, to flat buffers.

        Args:
            ddp_config: Bucket size, and whether buckets are reduced while backward runs.
            module: The model; each of its parameters has a role (``set_role``).
            pg_collection: ``dp_cp`` and ``expt_dp`` reduce gradients.
            device: Of this rank, for a pipeline rank without parameters.
        """
        super().__init__()
        self.module = module
        self.pg_collection = pg_collection
        self._names, self._params = _trainable(module)
        self.device = self._params[0].device if self._params else torch.device(device)
        self.is_sharded = ddp_config.use_distributed_optimizer
        self.bucket_layout = plan_buckets(
            [_spec(param) for param in self._params],
            ddp_config.bucket_size or default_bucket_size(pg_collection.dp_cp.size()),
            (lambda key: self._group(key).size()) if self.is_sharded else None,
        )
        self.grad_buffers = tuple(
            ParamAndGradBuffer(
                layout, self._params, group=self._group(layout.key), is_sharded=self.is_sharded
            )
            for layout in self.bucket_layout.buffers
        )
        self._reducer = GradReducer(self.bucket_layout.buckets, self._start_reduce)
        self._gatherer = ParamGatherer(self.bucket_layout.buckets, self._start_gather)
        self._overlap = ddp_config.overlap_grad_reduce
        self._overlap_gather = ddp_config.overlap_param_gather
        if self._overlap_gather:
            self._gatherer.watch(module, {param: n for n, param in enumerate(self._params)})
        self._is_last_microbatch = True
        self._is_synced = False
        self._accumulators = [self._watch(n, param) for n, param in enumerate(self._params)]

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the model, parameter) in registration order, each parameter once."""
        self.finish_param_sync()
        yield from zip(self._names, self._params, strict=True)

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all trainable parameters."""
        yield from self.trainable_parameters()

    def layout_fingerprint(self) -> str:
        """See DataParallelBase.layout_fingerprint."""
        return self.bucket_layout.fingerprint()

    def zero_grad_buffer(self) -> None:
        """Begin a step: set all gradients to zero."""
        self._expect_settled("zero_grad_buffer")
        for buffer in self.grad_buffers:
            fill_zero(buffer.grad_data)
        self._reducer.reset()
        self._is_synced = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate: for every microbatch of a step but the last."""
        before, self._is_last_microbatch = self._is_last_microbatch, False
        try:
            yield
        finally:
            self._is_last_microbatch = before

    def finish_grad_sync(self) -> None:
        """Start the reductions that were not started and wait for all; once in a step.

        Weight gradients that were put off (``WeightGradQueue``) must have been made.
        """
        self._expect_settled("finish_grad_sync")
        self._reducer.finish()
        self._is_synced = True

    def start_param_sync(self) -> None:
        """Gather the weights that other ranks own; every rank, after it wrote its own slices.

        With ``overlap_param_gather`` modules wait for theirs when they are called next.
        """
        if self.is_sharded:
            self._gatherer.start()
        if not self._overlap_gather:
            self._gatherer.finish()

    def finish_param_sync(self) -> None:
        """Wait until all weights are there; before anybody but a forward reads or writes them."""
        self._gatherer.finish()

    def nonfinite_gradients(self) -> list[str]:
        """Name the parameters whose gradient holds an inf or a NaN; slow, for messages only.

        Collective over all ranks: replicas name the same, and so do the stages of a pipeline.
        """
        mine: list[int] = []
        for number, buffer in enumerate(self.grad_buffers):
            here = [b for b in self.bucket_layout.buckets if b.buffer == number]
            own = [buffer.own(bucket.start, bucket.end) for bucket in here]
            counts = torch.tensor(
                [_count_nonfinite(buffer.grad_data, span, own) for span in buffer.layout.spans],
                device=self.device,
            )
            if self.is_sharded:  # of this buffer alone: its ranks may differ in all others
                torch.distributed.all_reduce(counts, group=buffer.group)
            found = zip(buffer.layout.spans, counts.tolist(), strict=True)
            mine += [span.param for span, count in found if count]
        names = [self._names[param] for param in sorted(mine)]
        return _of_all_stages(names, self.pg_collection.pp)

    def _expect_settled(self, call: str) -> None:
        names = [self._names[param] for param in self._reducer.unsettled()]
        assert not names, (
            f"{call}() before the weight gradients of {len(names)} parameters were made, such as "
            f"{names[0]}: run() of a WeightGradQueue is missing"
        )

    def _group(self, key: BufferKey) -> torch.distributed.ProcessGroup:
        groups = self.pg_collection
        if key.is_expert:
            return groups.expt_dp
        if key.tied_ends == "apart":
            return groups.dp_cp_ends
        return groups.tp_dp_cp if key.sums_over_tp else groups.dp_cp

    def _start_reduce(self, bucket: Bucket) -> Pending | None:
        return self.grad_buffers[bucket.buffer].start_reduce(bucket.start, bucket.end)

    def _start_gather(self, bucket: Bucket) -> Pending | None:
        return self.grad_buffers[bucket.buffer].start_gather(bucket.start, bucket.end)

    def _watch(self, number: int, param: nn.Parameter) -> Node:
        """Gather what backward makes of ``param``; the result lives as long as its hooks."""
        is_shared = role_of(param).tied_ends != "no"

        def sum_in_time() -> Tensor:
            assert not self._is_synced, (
                f"a gradient of {self._names[number]} came after finish_grad_sync(); "
                "call zero_grad_buffer() before the next backward"
            )
            assert not self._reducer.is_late(number), (
                f"a gradient of {self._names[number]} came after its bucket was reduced; "
                "run all microbatches but the last under no_sync()"
            )
            return _main_grad(param)

        def accumulate(param: Tensor) -> None:
            if param.grad is not None:  # else it went through the sink
                sum_in_time().add_(param.grad)
                param.grad = None

        def note_filled(*_: object) -> None:
            # backward reaches what two stages share more than once
            if self._overlap and self._is_last_microbatch and not is_shared:
                self._reducer.mark_filled(number)

        offer_grad_sink(param, _Sink(self._reducer, number, sum_in_time))
        param.register_post_accumulate_grad_hook(accumulate)
        # Called once in a backward, behind all uses of the parameter and behind the hook above,
        # also when no use returned a gradient.
        accumulator = _accumulator(param)
        accumulator.register_hook(note_filled)
        return accumulator


class _Sink:
    """See ``GradSink``: the way into ``main_grad`` of one parameter."""

    def __init__(self, reducer: GradReducer, number: int, sum_in_time: Callable[[], Tensor]):
        self._reducer, self._number, self._sum_in_time = reducer, number, sum_in_time

    def __call__(self) -> Tensor:
        return self._sum_in_time()

    def put_off(self) -> None:
        self._sum_in_time()  # fails here, where the stack shows whose gradient is late
        self._reducer.put_off(self._number)

    def settle(self) -> None:
        self._reducer.settle(self._number)


def _accumulator(param: nn.Parameter) -> Node:
    """Return the node at which all gradients of ``param`` arrive."""
    with torch.enable_grad():
        used = param.view_as(param).grad_fn
    assert used is not None, "a trainable parameter is in the graph of its uses"
    node = used.next_functions[0][0]
    assert node is not None, "a use leads to the parameter"
    return node


def _trainable(module: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    named = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    return [name for name, _ in named], [param for _, param in named]


def _count_nonfinite(flat: Tensor, span: Span, owned: Sequence[tuple[int, int]]) -> int:
    """Count the stretches [start, end) of ``owned`` where ``span`` holds an inf or a NaN."""
    parts = [flat[max(span.start, start) : max(start, min(span.end, end))] for start, end in owned]
    return sum(int(not torch.isfinite(part).all()) for part in parts)


def _of_all_stages(names: list[str], group: torch.distributed.ProcessGroup) -> list[str]:
    """Return the names of all ranks of ``group``, in rank order, each once."""
    if group.size() == 1:
        return names
    every: list[list[str]] = [[] for _ in range(group.size())]
    torch.distributed.all_gather_object(every, names, group=group)
    return list(dict.fromkeys(name for found in every for name in found))


def _spec(param: nn.Parameter) -> ParamSpec:
    role = role_of(param)
    return ParamSpec(
        numel=param.numel(),
        is_expert=role.is_expert,
        decays=role.decays,
        dtype=str(param.dtype),
        split_over=role.split_over,
        sums_over_tp=role.sums_over_tp,
        tied_ends=role.tied_ends,
    )


def _main_grad(param: Tensor) -> Tensor:
    return param.main_grad  # type: ignore[attr-defined, no-any-return]
