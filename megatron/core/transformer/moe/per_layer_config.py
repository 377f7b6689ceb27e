"""Options that give each MoE layer its own number of experts and top-k, and the rules of both.

Imports no torch. What a layer is built from is ``TransformerConfig.for_layer``, plain numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron.core.config_field import flag
from megatron.core.transformer.config.layer_pattern import parse_layer_numbers
from megatron.core.transformer.moe.moe_config import MoEConfig


@dataclass(kw_only=True)
class MoEPerLayerConfig(MoEConfig):
    """Mixture-of-experts layer, layer by layer."""

    moe_num_experts_per_layer: list[int] | None = field(
        default=None, metadata=flag(parse=parse_layer_numbers)
    )
    """Number of routed experts of each layer, as a pattern such as ([8]*2+[16]*2) with one entry a
    layer and 0 for those that --moe-layer-freq makes dense. --num-experts for all when not set."""

    moe_router_topk_per_layer: list[int] | None = field(
        default=None, metadata=flag(parse=parse_layer_numbers)
    )
    """Number of experts that each token is sent to in each layer, as a pattern such as
    ([2]*3+[1]) with one entry a layer and 0 for dense ones. --moe-router-topk for all when not
    set."""

    @property
    def has_layer_patterns(self) -> bool:
        """Whether MoE layers may differ."""
        patterns = self.moe_num_experts_per_layer, self.moe_router_topk_per_layer
        return any(pattern is not None for pattern in patterns)

    def per_layer_problems(self, is_moe: Sequence[bool]) -> Iterator[str]:
        """Yield one sentence for each way in which a pattern does not fit the layers.

        Args:
            is_moe: For each layer, whether it is a MoE layer.
        """
        for name, pattern in (
            ("--moe-num-experts-per-layer", self.moe_num_experts_per_layer),
            ("--moe-router-topk-per-layer", self.moe_router_topk_per_layer),
        ):
            if pattern is not None:
                yield from _pattern_problems(name, pattern, is_moe)
        experts = self.moe_num_experts_per_layer
        if experts and self.num_moe_experts != max(experts):
            yield (
                f"--num-experts {self.num_moe_experts} must be the largest entry of "
                f"--moe-num-experts-per-layer, {max(experts)}; leave it out"
            )


def _pattern_problems(name: str, pattern: list[int], is_moe: Sequence[bool]) -> Iterator[str]:
    if len(pattern) != len(is_moe):
        yield (
            f"{name} has {len(pattern)} entries, one for each of --num-layers {len(is_moe)} is "
            "needed"
        )
        return
    for layer, (number, moe) in enumerate(zip(pattern, is_moe, strict=True)):
        if moe and number < 1:
            yield (
                f"{name} holds {number} for layer {layer}, which is a MoE layer: give at least 1, "
                "or make the layer dense with --moe-layer-freq"
            )
            return
        if not moe and number != 0:
            yield (
                f"{name} holds {number} for layer {layer}, which --moe-layer-freq makes dense: "
                "write 0 there"
            )
            return
