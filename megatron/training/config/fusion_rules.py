"""Rules of fused kernels on CUDA: what is asked for by name must be possible.

By default they are used where they can be; only a flag that turns one on asks for it.
"""

import importlib.util
from collections.abc import Iterator

from megatron.core.transformer.config.activation import SWIGLU
from megatron.training.config.checks import Check, Rule
from megatron.training.config.run_config import RunConfig

ASKABLE = ("bias_swiglu_fusion", "moe_permute_fusion")


def asked_fusions(config: RunConfig) -> list[str]:
    """Return the field names of the kernels that the user turned on by name."""
    return [name for name in ASKABLE if config.given(name) and getattr(config.model, name)]


def fused_kernels(check: Check) -> Iterator[str]:
    """Kernels need something to compute, a device, the package, and a number format they know."""
    model = check.config.model
    asked = asked_fusions(check.config)
    if not asked or model.num_moe_experts is None:
        return
    shown = check.show(*asked)
    if model.params_dtype_name == "float64":
        yield f"{shown} computes fp32, bf16 and fp16 only: leave it or --fp64 out"
    if "bias_swiglu_fusion" in asked and model.activation_kind != SWIGLU:
        yield "--bias-swiglu-fusion computes plain SwiGLU only: add --swiglu, or leave it out"
    if check.config.distributed.device == "cpu":
        yield f"{shown} is for CUDA: leave out --device cpu, or {shown}"
    elif not check.config.dry_run.dry_run and importlib.util.find_spec("triton") is None:
        yield (
            f"{shown} needs the package triton, which is not installed: pip install triton (it "
            "comes with torch's builds for CUDA), or leave it out"
        )


FUSION_RULES: tuple[Rule, ...] = (fused_kernels,)
