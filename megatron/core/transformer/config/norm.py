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
