"""Options of number formats. TransformerConfig inherits them; torch dtypes are made elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats."""

    bf16: bool = False
    """Compute in bfloat16 with fp32 main weights, gradients and moments. Otherwise fp32."""

    fp64: bool = False
    """Compute everything in float64, for proofs and tests: slow, and grouped GEMM becomes a loop
    over experts."""

    def precision_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        if self.bf16 and self.fp64:
            yield "--bf16 and --fp64 exclude each other; give one of them"

    @property
    def params_dtype_name(self) -> str:
        """Name of the parameters' dtype: ``bfloat16``, ``float64`` or ``float32``."""
        return "bfloat16" if self.bf16 else "float64" if self.fp64 else "float32"
