"""Options of fused kernels on CUDA. TransformerConfig inherits them.

They are off where they cannot be: on CPUs, without the package triton, in fp64.
"""

from dataclasses import dataclass


@dataclass(kw_only=True)
class FusionConfig:
    """Fused kernels on CUDA."""

    bias_swiglu_fusion: bool = True
    """On CUDA with the package triton, compute the SwiGLU of routed experts, times the weight of
    the row, and each of its gradients in one kernel instead of one for each operation. Last bits
    differ."""

    moe_permute_fusion: bool = True
    """On CUDA with the package triton, sum the outputs of the experts of a token, and the gradients
    of its copies, in one kernel instead of several for each expert. Results are the same, bit for
    bit. --moe-permute-fusion asks for it: a run that cannot have it does not start."""
