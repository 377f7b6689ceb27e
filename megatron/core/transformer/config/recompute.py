"""Options of recomputing activations in backward. TransformerConfig inherits them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class RecomputeConfig:
    """Recomputation."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Save memory by computing again in backward: whole layers (full), or parts of each layer, see
    --recompute-modules (selective). Everything is kept when not set. Results are the same, bit for
    bit."""

    recompute_method: Literal["uniform", "block"] | None = None
    """Under --recompute-granularity full: keep only the input of every --recompute-num-layers
    layers (uniform), or recompute the first --recompute-num-layers layers, each by itself, and
    keep all of the others (block)."""

    recompute_num_layers: int | None = None
    """Layers that are recomputed together (uniform), or layers that are recomputed at all
    (block). Counted in each pipeline stage."""

    recompute_modules: (
        list[Literal["core_attn", "mla_up_proj", "moe_act", "mlp", "moe", "shared_experts"]] | None
    ) = None
    """Under --recompute-granularity selective, what is recomputed: the core of attention, the
    queries, keys and values that --multi-latent-attention makes from latents, and the core with
    them (mla_up_proj), the dense MLP, the whole MoE layer with its router, or its shared experts.
    The activation inside experts (moe_act) always is, under --moe-experts-type grouped. core_attn
    when not set."""

    def recompute_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        is_full = self.recompute_granularity == "full"
        if is_full and (self.recompute_method is None or self.recompute_num_layers is None):
            yield (
                "--recompute-granularity full needs --recompute-method and --recompute-num-layers; "
                "uniform and 1 save most"
            )
        modules = self.recompute_modules or []
        if len(set(modules)) < len(modules):
            yield f"--recompute-modules {' '.join(modules)} names one part twice"
        elif {"moe", "shared_experts"} <= set(modules):
            yield (
                "--recompute-modules moe shared_experts: moe recomputes shared experts as well; "
                "leave one out"
            )

    @property
    def recomputed_modules(self) -> frozenset[str]:
        """Parts of a layer that are recomputed by themselves."""
        if self.recompute_granularity != "selective":
            return frozenset()
        return frozenset(self.recompute_modules or ["core_attn"])

    def recomputed_spans(self, num_layers: int) -> list[range]:
        """Cut the layers, in order, into spans; one of several layers or more is recomputed whole.

        Returns:
            Spans that are recomputed; the layers in none of them are kept.
        """
        if self.recompute_granularity != "full":
            return []
        size = self.recompute_num_layers or 1
        if self.recompute_method == "block":
            return [range(layer, layer + 1) for layer in range(min(size, num_layers))]
        return [range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]
