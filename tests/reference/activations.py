"""Activations by their textbook formulas; nothing of megatron is used."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

FORMULAS = {
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x / (1 + (-x).exp()),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "squared_relu": lambda x: torch.where(x > 0, x * x, 0 * x),
}


class ReferenceActivation(NamedTuple):
    """f(x), or f(gate) * (up + offset) with both cut off at ``clamp``."""

    function: str
    gated: bool
    offset: float = 0.0
    clamp: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to [..., ffn], or to [..., 2 * ffn] when gated: gate before up."""
        f = FORMULAS[self.function]
        if not self.gated:
            return f(x)
        gate, up = x.chunk(2, dim=-1)
        if self.clamp is not None:
            gate = torch.where(gate > self.clamp, torch.full_like(gate, self.clamp), gate)
            up = torch.where(up > self.clamp, torch.full_like(up, self.clamp), up)
            up = torch.where(up < -self.clamp, torch.full_like(up, -self.clamp), up)
        return f(gate) * (up + self.offset)


ACTIVATIONS = {
    "gelu": ReferenceActivation("gelu", False),
    "openai_gelu": ReferenceActivation("gelu_tanh", False),
    "squared_relu": ReferenceActivation("squared_relu", False),
    "swiglu": ReferenceActivation("silu", True),
    "swiglu_clamped": ReferenceActivation("silu", True, clamp=0.5),
    "geglu": ReferenceActivation("gelu", True),
    "geglu_tanh": ReferenceActivation("gelu_tanh", True),
    "quick_geglu": ReferenceActivation("quick_gelu", True),
    "gpt_oss": ReferenceActivation("quick_gelu", True, 1.0, 0.5),
    "offset": ReferenceActivation("gelu", True, -0.25),
}
OPTIONS = {
    "gelu": {},
    "openai_gelu": {"openai_gelu": True},
    "squared_relu": {"squared_relu": True},
    "swiglu": {"swiglu": True},
    "swiglu_clamped": {"swiglu": True, "activation_func_clamp_value": 0.5},
    "geglu": {"geglu": True},
    "geglu_tanh": {"geglu": True, "openai_gelu": True},
    "quick_geglu": {"quick_geglu": True},
    "gpt_oss": {
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": 0.5,
    },
    "offset": {"geglu": True, "glu_linear_offset": -0.25},
}
"""Name in ``ACTIVATIONS`` -> options of a config; a clamp of 0.5 cuts off a good part."""
