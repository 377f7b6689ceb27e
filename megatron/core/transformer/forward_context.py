"""What one forward needs besides its tensors, passed down and never looked up.

Nothing of a forward lives on a module: a recomputed layer or a second microbatch in flight gets
its own context, so dropout masks, metric slots and caches cannot be mixed up.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.inference.kv_cache import KVCache
    from megatron.core.tensor_parallel.random import SampleRng
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """One microbatch's passage through the model."""

    rng: "SampleRng | None" = None
    """Draws dropout masks from (seed, sample, layer, site); None turns dropout off."""
    microbatch: int = 0
    """Slot of this microbatch within the optimizer step, for metrics."""
    moe_metrics: "MoEMetricsTracker | None" = None
    """Where routers write their counts; None records nothing."""
    aux_loss_scale: float | Tensor = 1.0
    """Gradient with which auxiliary losses enter backward: 1 / (microbatches x data ranks)."""
    kv_cache: "KVCache | None" = None
    """Keys and values of earlier positions, in generation."""
    same_num_tokens: bool = False
    """Every data-parallel rank has as many tokens as this one, and knows it."""
