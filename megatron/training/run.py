"""The live objects of one run; the few numbers that change from step to step are TrainState."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.core.distributed.data_parallel_base import DataParallelBase
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.executor import PipelineExecutor
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router_trace import RouterTracer
from megatron.training.checkpoint_state import TrainState
from megatron.training.config.run_config import RunConfig
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World
from megatron.training.loss import MaskedLoss

__all__ = ["ForwardStep", "LossFunction", "Run", "TrainState"]

LossFunction = Callable[[Tensor], MaskedLoss]
ForwardStep = Callable[[Iterator[Batch], Callable[..., Tensor]], tuple[Tensor, LossFunction]]
"""``forward_step(data_iterator, model) -> (output, loss_func)``, as in Megatron's scripts: takes
one microbatch from the iterator; ``loss_func(output)`` gives its ``MaskedLoss``."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a step needs."""

    config: RunConfig
    world: World
    model: DataParallelBase
    optimizer: Any
    """Has ``step()`` and ``param_groups``."""
    scheduler: OptimizerParamScheduler
    forward_step: ForwardStep
    pipeline: PipelineExecutor
    """Takes the microbatches of a step through the model, on one pipeline rank as on several."""
    num_microbatches: int
    moe_metrics: MoEMetricsTracker | None
    """None in a model without MoE layers."""
    router_tracer: RouterTracer | None = None
    """None unless --moe-routing-trace-path asks for a trace."""

    @property
    def is_tracing(self) -> bool:
        """Whether this step belongs to the routing trace."""
        return self.router_tracer is not None and self.router_tracer.is_on

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.tokenizer.padded_vocab_size

    @property
    def global_batch_size(self) -> int:
        """Samples of one step over all ranks."""
        return self.config.training.global_batch_size

    @property
    def train_iters(self) -> int:
        """Steps of the whole run."""
        return self.config.training.train_iters

    @property
    def seq_length(self) -> int:
        """Tokens of one sample."""
        return self.config.data.seq_length
