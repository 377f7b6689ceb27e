"""Options of normalisation layers. TransformerConfig inherits them."""

from dataclasses import dataclass, field
from typing import Literal

from megatron.core.config_field import flag


@dataclass(kw_only=True)
class NormConfig:
    """Normalisation."""

    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of normalisation before attention, before the MLP and at the end."""

    layernorm_epsilon: float = field(default=1e-5, metadata=flag("--norm-epsilon"))
    """Added to the variance before its square root."""

    layernorm_zero_centered_gamma: bool = field(
        default=False, metadata=flag("--apply-layernorm-1p")
    )
    """Keep the weight of a norm as its difference from 1, which narrow formats hold better and
    which begins at 0; the norm multiplies by 1 + weight (Gemma)."""
