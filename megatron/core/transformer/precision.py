"""The torch dtypes behind the precision options, which themselves import no torch."""

import torch

from megatron.core.transformer.config.precision import PrecisionConfig


def params_dtype(config: PrecisionConfig) -> torch.dtype:
    """Return the dtype of parameters and activations: bfloat16, float16, float64 or float32."""
    dtype = getattr(torch, config.params_dtype_name)
    assert isinstance(dtype, torch.dtype), f"{config.params_dtype_name=} names no torch dtype"
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which softmaxes, norms and losses of ``dtype`` data are computed.

    float64 stays, everything narrower becomes float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
