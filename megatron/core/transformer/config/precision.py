"""Options of number formats. TransformerConfig inherits them; torch dtypes are made elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats."""

    bf16: bool = False
    """Compute in bfloat16 with fp32 main weights, gradients and moments. Otherwise fp32."""

    fp16: bool = False
    """Compute in float16 with fp32 main weights, gradients and moments, and with a loss scale (see
    --loss-scale). For GPUs without bf16: numbers end at 65504."""

    fp64: bool = False
    """Compute everything in float64, for proofs and tests: slow, and grouped GEMM becomes a loop
    over experts."""

    def precision_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        given = [f"--{name}" for name in ("fp16", "bf16", "fp64") if getattr(self, name)]
        if len(given) > 1:
            few = " and ".join(given) if len(given) == 2 else "--fp16, --bf16 and --fp64"
            yield f"{few} exclude each other; give one of them"

    @property
    def params_dtype_name(self) -> str:
        """Name of the parameters' dtype: ``bfloat16``, ``float16``, ``float64`` or ``float32``."""
        names = {"bfloat16": self.bf16, "float16": self.fp16, "float64": self.fp64}
        return next((name for name, is_wanted in names.items() if is_wanted), "float32")
