"""What one forward needs besides its tensors, passed down and never looked up.

Nothing of a forward lives on a module: a recomputed layer or a second microbatch in flight gets
its own context, so dropout masks, metric slots and caches cannot be mixed up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.inference.kv_cache import KVCache
    from megatron.core.lanes import Lanes
    from megatron.core.tensor_parallel.random import SampleRng
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.core.transformer.moe.router_replay import RouterReplay
    from megatron.core.transformer.moe.router_trace import RouterTracer
    from megatron.core.transformer.tokens_ahead import AheadOfStep


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """One microbatch's passage through the model."""

    rng: "SampleRng | None" = None
    """Draws dropout masks from (seed, sample, layer, site); None turns dropout off."""
    microbatch: int = 0
    """Slot of this microbatch within the optimizer step, for metrics."""
    iteration: int = 0
    """Steps made before this one, for what is drawn anew in each."""
    moe_metrics: "MoEMetricsTracker | None" = None
    """Where routers write their counts; None records nothing."""
    router_tracer: "RouterTracer | None" = None
    """Where MoE layers write what each token chose; None traces nothing."""
    aux_loss_scale: float | Tensor = 1.0
    """Weight of auxiliary losses in the loss of the step: 1 / (microbatches x data ranks)."""
    loss_scale: float = 1.0
    """What the loss of the step is multiplied by before backward, auxiliary losses too."""
    padding_mask: Tensor | None = None
    """[b, s] bool, True where a token is padding: it is routed like any other, but is in no
    balance loss, count, entropy or expert bias. None for none."""
    mean_valid_tokens: Tensor | None = None
    """[] tokens of a microbatch, of all its shares, that are no padding, mean over the global
    batch; losses that are means over tokens divide by it. None: by the tokens of each."""
    kv_cache: "KVCache | None" = None
    """Keys and values of earlier positions, in generation."""
    same_num_tokens: bool = False
    """Every data-parallel rank has as many tokens as this one, and knows it."""
    router_replay: "Mapping[int, RouterReplay] | None" = None
    """Layer number -> what its router records or replays, in place of what the router owns."""
    chunk: int = 0
    """Which of the stages that this rank holds, in the order of the model."""
    pipeline_input: Tensor | None = None
    """[s, b, h], what the stage before gave; None at the first stage. The model reads it."""
    lanes: "Lanes | None" = None
    """Where this forward and its backward let another microbatch compute, while rows travel to
    experts and back; None waits for the rows."""
    ahead: "AheadOfStep | None" = None
    """What multi-token prediction reads, and what its losses weigh; None does without."""
    token_ids: Tensor | None = None
    """[b, s], ids of the tokens that this forward reads; the model fills them in."""

    def padding_rows(self) -> Tensor | None:
        """Return the padding mask in the order of a router's rows, [s*b] bool, or None."""
        return None if self.padding_mask is None else self.padding_mask.t().reshape(-1)
