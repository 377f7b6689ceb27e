"""What a MoE layer does besides matrix products, each part alone, forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.core.transformer.config.activation import SWIGLU
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.expert_activation import (
    IN_TORCH,
    Activation,
    ActivationGradient,
)
from megatron.core.transformer.moe.fused_swiglu import fused_swiglu
from megatron.core.transformer.moe.moe_layer import MoELayer


class Parts:
    """The parts of one layer with swiglu experts; ``take`` gives them the tokens of a round."""

    def __init__(self, layer: MoELayer, tokens: Tensor, grad: Tensor) -> None:
        """Start with ``tokens`` [num_tokens, 1, h]; ``grad`` is that of the layer's output."""
        self.layer, self.context = layer, ForwardContext()
        self.grad = grad.flatten(0, 1)
        self.take(tokens)

    @torch.no_grad()
    def take(self, tokens: Tensor) -> None:
        """Go on with other ``tokens``."""
        self.tokens = tokens
        self.probs, self.routing_map = self.layer.router(tokens, self.context)
        self.sizes = self.routing_map.sum(dim=0).tolist()
        most = max(self.sizes)
        width = self.layer.config.moe_ffn_size
        self.inner = torch.randn(most, 2 * width, dtype=tokens.dtype)
        self.inner_grad = torch.randn(most, width, dtype=tokens.dtype)
        self.weights = torch.rand(most)

    def calls(self) -> dict[str, Callable[[], None]]:
        """Return the parts by name."""
        return {
            "router": self.route,
            "permute": self.permute,
            "activation": self.activate,
            "fused activation": self.activate_fused,
        }

    def route(self) -> None:
        """Gate, top-k, probs, and back."""
        tokens = self.tokens.detach().requires_grad_()
        probs = self.layer.router(tokens, self.context).probs
        probs.backward(self.probs)

    def permute(self) -> None:
        """Tokens to rows and rows to tokens, and back, as if experts did nothing."""
        dispatcher = self.layer.token_dispatcher
        tokens = self.tokens.flatten(0, 1).detach().requires_grad_()
        probs = self.probs.detach().requires_grad_()
        sent = dispatcher.token_permutation(tokens, probs, self.routing_map)
        out = dispatcher.token_unpermutation(sent.hidden_states, sent)
        torch.autograd.backward((out, sent.probs), (self.grad, sent.probs.detach()))

    def activate(self) -> None:
        """SwiGLU times prob and its gradient, expert by expert."""
        self._activate(IN_TORCH)

    def activate_fused(self) -> None:
        """The same in one pass each."""
        self._activate(fused_swiglu(self.inner.dtype))

    def _activate(self, way: Activation) -> None:
        for size in self.sizes:
            inner, grad, probs = self.inner[:size], self.inner_grad[:size], self.weights[:size]
            active = torch.empty_like(grad)
            found = ActivationGradient(*map(torch.empty_like, (inner, probs, grad)))
            way.activate(inner, probs, kind=SWIGLU, out=active)
            way.differentiate(inner, probs, grad, kind=SWIGLU, out=found)
