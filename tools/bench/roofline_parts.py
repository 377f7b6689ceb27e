"""The parts of a step that are no plain matrix products, each alone, by the ways we know.

Modules are those of a real step; inputs are as large and as far from the cache as there, one set
for each layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.transformer.config.activation import SWIGLU
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.expert_activation import (
    IN_TORCH,
    Activation,
    ActivationGradient,
)
from megatron.core.transformer.moe.fused_swiglu import fused_swiglu
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.rotary import split_and_rotate
from tools.bench.step_ours import Step

Ways = dict[str, Callable[[], object]]
SOFTMAX = "cross-entropy softmax"
_CHUNK = 256
"""Rows of logits that are worked on at a time."""


class Parts:
    """Calls that do one part of a step for all layers."""

    def __init__(self, step: Step, device: str) -> None:
        """Take modules and sizes from ``step``."""
        self.step, self.device = step, device
        self.config, self.size = step.run.config.model, step.size
        self.dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        self.layers: list[Any] = list(step.ddp.module.decoder.layers.values())
        self.context = ForwardContext()
        step.ddp.zero_grad_buffer()  # backwards may begin again

    def by_row(self) -> dict[str, Ways]:
        """Return the ways of every part but attention, by the name of its row."""
        return {
            SOFTMAX: {"passes of torch over 256 rows": self._softmax()},
            "SwiGLU x probability": self._activation(),
            "norms, residual": {"our modules": self._norms()},
            "router, permute, unpermute": {"our modules": self._routing()},
            "AdamW, norm, zero, copies": {"our optimizer": self._optimizer},
        }

    def attention(self) -> Ways:
        """Return ways to rotate and attend, forward and backward: all between the projections."""
        hidden, length = self.config.hidden_size, self.size.sequence
        heads, shape = self.config.num_attention_heads, (length, self.size.microbatch)
        mixed = [self._randn(*shape, 3 * hidden).requires_grad_() for _ in self.layers]
        grad = self._randn(*shape, hidden)
        positions = (range(length),)
        tables = self.step.ddp.module.rotary_pos_emb(positions, grad, length=length)

        def ours() -> None:
            for layer, x in zip(self.layers, mixed, strict=True):
                with _without_projections(layer.self_attention):
                    layer.self_attention(x, None, tables, self.context)[0].backward(grad)

        def sdpa() -> None:
            for x in mixed:
                qkv = split_and_rotate(x.view(*shape, heads, 3, -1), tables)
                out = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
                out.permute(2, 0, 1, 3).flatten(2).backward(grad)

        return {"ours": _forgetting(ours, [mixed]), "SDPA": _forgetting(sdpa, [mixed])}

    def experts(self) -> Callable[[], None]:
        """Return a call that does all of the experts' work, products too, with even rows."""
        rows = self.size.tokens * self.config.moe_router_topk
        count = self.config.num_moe_experts or 1
        sizes = torch.full((count,), rows // count, device=self.device)
        inputs = [self._randn(rows, self.config.hidden_size).requires_grad_() for _ in self.layers]
        probs = torch.rand(rows, device=self.device).requires_grad_()
        grad = self._randn(rows, self.config.hidden_size)

        def call() -> None:
            outputs = [
                layer.mlp.experts(x, sizes, probs)[0]
                for layer, x in zip(self.layers, inputs, strict=True)
            ]
            for out in reversed(outputs):
                out.backward(grad)

        return _forgetting(call, [inputs, [probs]])

    def loss(self) -> Callable[[], None]:
        """Return a call that does the output layer with its loss, products too."""
        module, shape = self.step.ddp.module, (self.size.sequence, self.size.microbatch)
        hidden = self._randn(*shape, self.config.hidden_size).requires_grad_()
        labels = torch.randint(self.size.vocabulary, shape[::-1], device=self.device)

        def call() -> None:
            module.output_layer.loss(hidden, None, labels).mean().backward()

        return _forgetting(call, [[hidden]])

    def _softmax(self) -> Callable[[], None]:
        """Softmax of logits in place, less 1 at the label: what is left of it without products."""
        logits = self._randn(self.size.tokens, self.size.vocabulary)
        labels = torch.randint(self.size.vocabulary, (self.size.tokens, 1), device=self.device)

        def call() -> None:
            pairs = zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True)
            for chunk, label in pairs:
                wide = chunk.float()
                wide.sub_(wide.amax(dim=1, keepdim=True)).exp_()
                total = wide.sum(dim=1, keepdim=True)
                wide.scatter_add_(1, label, -total)
                if wide is not chunk:
                    chunk.copy_(wide)

        return call

    def _activation(self) -> Ways:
        rows, ffn = self.size.tokens * self.config.moe_router_topk, self.config.moe_ffn_size
        each = rows // (self.config.num_moe_experts or 1)
        sets = [(self._randn(rows, 2 * ffn), self._randn(rows, ffn)) for _ in self.layers]
        probs = torch.rand(rows, device=self.device)

        def way(activation: Activation) -> Callable[[], None]:
            def call() -> None:
                for inner, grad in sets:
                    split = (t.split(each) for t in (inner, grad, probs))
                    for block, block_grad, prob in zip(*split, strict=True):
                        _activate(activation, block, block_grad, prob)

            return call

        ways: Ways = {"blocks in torch": way(IN_TORCH)}
        if self.device == "cpu":
            compiled = fused_swiglu(self.dtype)
            if not isinstance(compiled, str):
                ways["compiled"] = way(compiled)
        return ways

    def _norms(self) -> Callable[[], None]:
        hidden = self.config.hidden_size
        shape = (self.size.sequence, self.size.microbatch, hidden)
        norms = [
            norm for one in self.layers for norm in (one.input_layernorm, one.pre_mlp_layernorm)
        ]
        norms.append(self.step.ddp.module.decoder.final_layernorm)
        inputs = [self._randn(*shape).requires_grad_() for _ in norms]
        branch = self._randn(*shape)

        def call() -> None:
            for norm, x in zip(norms, inputs, strict=True):
                norm(x + branch).backward(branch)

        return _forgetting(call, [inputs])

    def _routing(self) -> Callable[[], None]:
        shape = (self.size.sequence, self.size.microbatch, self.config.hidden_size)
        inputs = [self._randn(*shape).requires_grad_() for _ in self.layers]
        grad = self._randn(self.size.tokens, self.config.hidden_size)
        layers: list[MoELayer] = [layer.mlp for layer in self.layers]

        def call() -> None:
            for layer, x in zip(layers, inputs, strict=True):
                probs, routing_map = layer.router(x, self.context)
                dispatcher = layer.token_dispatcher
                sent = dispatcher.token_permutation(x.flatten(0, 1), probs, routing_map)
                out = dispatcher.token_unpermutation(sent.hidden_states, sent)
                torch.autograd.backward((out, sent.probs), (grad, sent.probs.detach()))

        return _forgetting(call, [inputs])

    def _optimizer(self) -> None:
        self.step.ddp.zero_grad_buffer()
        self.step.optimizer.step()

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


def _activate(activation: Activation, inner: Tensor, grad: Tensor, probs: Tensor) -> None:
    active = torch.empty_like(grad)
    found = ActivationGradient(*map(torch.empty_like, (inner, probs, grad)))
    activation.activate(inner, probs, kind=SWIGLU, out=active)
    activation.differentiate(inner, probs, grad, kind=SWIGLU, out=found)


class _Given(nn.Module):
    """Stands in for a projection: returns what it gets."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return ``x`` and no bias."""
        return x, None


@contextmanager
def _without_projections(attention: Any) -> Iterator[None]:
    """Let self-attention do only what is between its projections."""
    kept = attention.linear_qkv, attention.linear_proj
    attention.linear_qkv = attention.linear_proj = _Given()
    try:
        yield
    finally:
        attention.linear_qkv, attention.linear_proj = kept


def _forgetting(call: Callable[[], None], inputs: list[list[Tensor]]) -> Callable[[], None]:
    """Drop the gradients of inputs after each call: the next makes new ones, as a step does."""

    def called() -> None:
        call()
        for tensors in inputs:
            for tensor in tensors:
                tensor.grad = None

    return called
