"""Options of the activation between the matrices of an MLP. TransformerConfig inherits them.

Imports no torch. What a kind computes is in ``megatron/core/transformer/activations.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

PointwiseName = Literal["gelu", "gelu_tanh", "silu", "quick_gelu", "squared_relu"]


class ActivationKind(NamedTuple):
    """What an MLP computes between its matrices: f(x), or f(gate) * (up + offset)."""

    function: PointwiseName
    """What f is."""
    gated: bool
    """The first matrix makes gate and up, in this order, and f is of the gate."""
    offset: float = 0.0
    """Added to up."""
    clamp: float | None = None
    """Largest gate, and largest size of up, both before f and before the offset; None for any."""

    @property
    def is_limited(self) -> bool:
        """Whether gate or up are changed before they are used."""
        return self.offset != 0.0 or self.clamp is not None


GELU = ActivationKind("gelu", False)
SWIGLU = ActivationKind("silu", True)


@dataclass(kw_only=True)
class ActivationConfig:
    """Activation of MLP and experts."""

    swiglu: bool = False
    """Gated MLP with SiLU (three matrices) instead of GELU (two)."""

    geglu: bool = False
    """Gated MLP with GELU (three matrices): exact, or with --openai-gelu by tanh, as Grok-1 has
    it."""

    quick_geglu: bool = False
    """Gated MLP (three matrices) with x * sigmoid(1.702 x), as GPT-OSS has it together with
    --glu-linear-offset 1 and --activation-func-clamp-value 7."""

    openai_gelu: bool = False
    """GELU by its approximation with tanh, as GPT-2 has it, instead of exactly."""

    squared_relu: bool = False
    """The square of ReLU instead of GELU (two matrices)."""

    glu_linear_offset: float = 0.0
    """Number that a gated MLP adds to what the gate is multiplied with, before it is."""

    activation_func_clamp_value: float | None = None
    """In a gated MLP, no gate is above this number and what it is multiplied with lies between its
    negative and it, before --glu-linear-offset. Any value when not set."""

    @property
    def gated_linear_unit(self) -> bool:
        """Whether an MLP has three matrices: gate, up and down."""
        return self.activation_kind.gated

    @property
    def activation_kind(self) -> ActivationKind:
        """What MLP and experts compute between their matrices."""
        limits = self.glu_linear_offset, self.activation_func_clamp_value
        if self.swiglu:
            return ActivationKind("silu", True, *limits)
        if self.geglu:
            return ActivationKind("gelu_tanh" if self.openai_gelu else "gelu", True, *limits)
        if self.quick_geglu:
            return ActivationKind("quick_gelu", True, *limits)
        if self.squared_relu:
            return ActivationKind("squared_relu", False)
        return ActivationKind("gelu_tanh" if self.openai_gelu else "gelu", False)

    @property
    def activation_flags(self) -> tuple[str, ...]:
        """The flags that name the activation, those that are given; none is exact GELU."""
        names = ("swiglu", "geglu", "quick_geglu", "openai_gelu", "squared_relu")
        return tuple(f"--{name.replace('_', '-')}" for name in names if getattr(self, name))

    def activation_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        chosen = self.activation_flags
        if len(chosen) > 1 and chosen != ("--geglu", "--openai-gelu"):
            yield (
                f"{' and '.join(chosen)} exclude each other: an MLP has one activation; give one "
                "of them (only --geglu and --openai-gelu go together, for GELU by tanh)"
            )
            return
        limits = {
            f"--glu-linear-offset {self.glu_linear_offset:g}": self.glu_linear_offset != 0.0,
            f"--activation-func-clamp-value {self.activation_func_clamp_value or 0:g}": (
                self.activation_func_clamp_value is not None
            ),
        }
        for shown, is_given in limits.items():
            if is_given and not self.gated_linear_unit:
                yield (
                    f"{shown} needs a gated MLP: add --swiglu, --geglu or --quick-geglu, or leave "
                    "it out"
                )
