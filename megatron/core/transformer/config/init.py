"""Options of weight initialisation. TransformerConfig inherits them."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class InitConfig:
    """Initialisation."""

    init_method_std: float = 0.02
    """Standard deviation of initial weights; projections back into the residual stream are
    further divided by sqrt(2 x --num-layers)."""
