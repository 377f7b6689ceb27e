"""Sizes of the parallel axes, as options. The rank arithmetic itself is in parallel_layout.py."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron.core.parallel_layout import ParallelLayout


@dataclass(kw_only=True)
class ModelParallelConfig:
    """Model parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each dense weight matrix: heads, query groups, ffn and vocabulary are split
    over them."""

    sequence_parallel: bool = False
    """Between the matrices, give each tensor-parallel rank its share of the sequence: less memory
    for activations, the same result. --seq-length is a multiple of the ranks. On one rank there is
    nothing to split."""

    pipeline_model_parallel_size: int = 1
    """Ranks that the layers are split over, one stage of the model behind the other."""

    context_parallel_size: int = 1
    """Ranks that share each sequence, each with two of its 2 x N equal chunks; --seq-length is a
    multiple of 2 x N."""

    cp_comm_type: list[Literal["p2p", "all_gather", "a2a"]] = field(default_factory=lambda: ["p2p"])
    """How attention reaches the other ranks of a sequence: pass keys and values round a ring (p2p),
    gather them all (all_gather), or exchange positions for heads (a2a). One for all layers, or one
    a layer."""

    expert_model_parallel_size: int = 1
    """Ranks that the experts of a layer are spread over; divides --num-experts."""

    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices, each holding a part of the ffn; divides the experts'
    ffn size. --tensor-model-parallel-size when not set."""

    moe_dispatcher_node_size: int | None = None
    """Ranks of one node for --moe-token-dispatcher-type alltoall_hierarchical; torchrun's
    LOCAL_WORLD_SIZE when not set."""

    overlap_moe_expert_parallel_comm: bool = False
    """Run forwards by turns with backwards of other microbatches: while rows of one travel to their
    experts or back, the other computes. Results are the same, bit for bit; one microbatch more is
    kept. Pipelines need several virtual stages a rank."""

    delay_wgrad_compute: bool = False
    """With --overlap-moe-expert-parallel-comm: let backward send gradients of rows as soon as they
    are there, and compute those of weights while they travel. Results are the same, bit for bit."""

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert's matrices; follows tensor parallelism unless set."""
        own = self.expert_tensor_parallel_size
        return self.tensor_model_parallel_size if own is None else own

    def cp_comm_type_of(self, layer_number: int) -> Literal["p2p", "all_gather", "a2a"]:
        """Return how attention of a layer reaches the other ranks of a sequence."""
        kinds = self.cp_comm_type
        # layers of multi-token prediction count on, and are as the last
        return kinds[min(layer_number, len(kinds) - 1)]

    def data_ranks(self, world_size: int) -> int:
        """Return how many ranks read different samples; 1 where the sizes do not fit the world."""
        sizes = self.tensor_model_parallel_size, self.context_parallel_size
        return max(1, world_size // max(1, math.prod(sizes) * self.pipeline_model_parallel_size))

    def layout(self, world_size: int) -> ParallelLayout:
        """Return the rank layout of these sizes over ``world_size`` ranks."""
        return ParallelLayout(
            world_size=world_size,
            tp=self.tensor_model_parallel_size,
            cp=self.context_parallel_size,
            pp=self.pipeline_model_parallel_size,
            ep=self.expert_model_parallel_size,
            etp=self.expert_tensor_parallel_size,
            node_size=self.moe_dispatcher_node_size,
        )

    def parallel_problems(self) -> Iterator[str]:
        """Yield one sentence for each size that is not offered, in the user's flags."""
        for flag, size in {
            "--context-parallel-size": self.context_parallel_size,
            "--tensor-model-parallel-size": self.tensor_model_parallel_size,
            "--pipeline-model-parallel-size": self.pipeline_model_parallel_size,
            "--expert-model-parallel-size": self.expert_model_parallel_size,
            "--expert-tensor-parallel-size": self.expert_tensor_size,
        }.items():
            if size < 1:
                yield f"{flag} {size} must be >= 1"
