"""Options of upcycling. CheckpointConfig inherits them."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class UpcyclingConfig:
    """Upcycling."""

    moe_use_upcycling: bool = False
    """Begin with the dense model of --load, or of --pretrained-checkpoint at the first start: each
    MLP becomes experts that together compute what it did. The model is written to --save as of
    iteration 0; from there training begins."""

    moe_upcycling_granularity: int = 1
    """Cut each copy of a dense MLP into so many experts; it divides --num-experts and
    --moe-router-topk, and experts are so many times narrower."""
