"""The MoE layers that are timed against each other, all over the same weights and sums.

"training" adds gradients to fp32 sums: DistributedDataParallel's for our layer, the same buffers
through autograd's own accumulation (fp32) or a hook (bf16) for the others. "standalone" makes
fresh gradients in each call.
"""

import argparse
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Forward = Callable[[Tensor], Tensor]
"""[num_tokens, 1, h] -> the same shape."""


def moe_config(args: argparse.Namespace, dtype: str, experts: str) -> TransformerConfig:
    """Return the configuration of one layer of the shape that ``args`` gives."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden_size,
        num_attention_heads=1,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        num_moe_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk,
        moe_experts_type=experts,
        moe_aux_loss_coeff=[0.01],
        swiglu=True,
        add_bias_linear=False,
        bf16=dtype == "bf16",
    )


class TextbookLoop(nn.Module):
    """What one writes by hand, with care for speed: sort once, gather, three products, add back."""

    def __init__(self, gate: Tensor, weight1: Tensor, weight2: Tensor, topk: int) -> None:
        super().__init__()
        self.topk = topk
        self.gate = _linear(gate)
        self.fc1 = nn.ModuleList(map(_linear, weight1))
        self.fc2 = nn.ModuleList(map(_linear, weight2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply to [num_tokens, 1, h]."""
        tokens = hidden_states.flatten(0, 1)
        best, chosen = self.gate(tokens).float().topk(self.topk, dim=1)
        weight_of_pair = best.softmax(dim=1).to(tokens.dtype).flatten()
        expert_of_pair = chosen.flatten()
        pair_of_row = expert_of_pair.argsort(stable=True)
        sizes = expert_of_pair.bincount(minlength=len(self.fc1)).tolist()
        canvas = torch.zeros_like(tokens)
        for fc1, fc2, pairs in zip(self.fc1, self.fc2, pair_of_row.split(sizes), strict=True):
            token = pairs // self.topk
            gate, up = fc1(tokens.index_select(0, token)).chunk(2, dim=1)
            output = fc2(nn.functional.silu(gate) * up)
            weight = weight_of_pair.index_select(0, pairs).unsqueeze(1)
            canvas.index_add_(0, token, output * weight)
        return canvas.view_as(hidden_states)


class Contenders:
    """Layers of one dtype; ``forwards`` are by name, ``ours`` is the layer that is measured."""

    def __init__(
        self,
        args: argparse.Namespace,
        dtype: str,
        gate: Tensor,
        peers: ModuleType | None,
        *,
        trains: bool,
    ) -> None:
        """Build them.

        Args:
            args: Shape of the layer.
            dtype: A key of ``DTYPES``.
            gate: [E, h], the router's weight.
            peers: ``transformers.models.mixtral.modeling_mixtral`` where it is installed.
            trains: Add gradients to sums.
        """
        self.trains = trains
        config = moe_config(args, dtype, "grouped")
        groups = ProcessGroupCollection.create(config.layout(1))
        self.ours: MoELayer = build_module(
            get_moe_module_spec(config), config, layer_number=0, pg_collection=groups
        )
        init_weights(self.ours, seed=1)
        self.ours.router.weight.data.copy_(gate)
        if trains:
            options = DistributedDataParallelConfig()
            self.ddp = DistributedDataParallel(options, self.ours, pg_collection=groups)
        context, experts = ForwardContext(), self.ours.experts
        self.stacks = (self.ours.router.weight, experts.weight1, experts.weight2)
        others: dict[str, nn.Module] = {"sequential": self._sequential(args, dtype, groups)}
        others["textbook loop"] = TextbookLoop(*self.stacks, args.moe_router_topk)
        self.forwards: dict[str, Forward] = {
            name: lambda x, fused=fused: self._ours(fused, x, context)
            for name, fused in (("grouped", "off"), ("fused", "auto"))
        }
        self.forwards["sequential"] = lambda x: others["sequential"](x, context)[0]
        self.forwards["textbook loop"] = others["textbook loop"]
        for kind in () if peers is None else ("grouped_mm", "eager"):
            name = f"transformers {kind}"
            others[name] = self._mixtral(args, peers, kind)
            self.forwards[name] = lambda x, name=name: others[name](x.transpose(0, 1)).transpose(
                0, 1
            )
        self.others = others
        self._gather()

    def _ours(self, fused: str, tokens: Tensor, context: ForwardContext) -> Tensor:
        self.ours.experts.fused = fused
        return self.ours(tokens, context)[0]

    def forget_gradients(self) -> None:
        """Drop fresh gradients; sums stay and grow."""
        if not self.trains:
            for module in (self.ours, *self.others.values()):
                module.zero_grad(set_to_none=True)

    def _gather(self) -> None:
        """Let the gradients of all but ours go to our sums."""
        if not self.trains:
            return
        sums = {_place(p): p.main_grad for stack in self.stacks for p in _pieces(stack)}
        for module in self.others.values():
            for param in module.parameters():
                total = sums[_place(param)]
                if total.dtype == param.dtype:
                    param.grad = total
                else:
                    param.register_post_accumulate_grad_hook(_adder(total))

    def _sequential(
        self, args: argparse.Namespace, dtype: str, groups: ProcessGroupCollection
    ) -> nn.Module:
        config = moe_config(args, dtype, "sequential")
        with torch.device("meta"):
            layer: MoELayer = build_module(
                get_moe_module_spec(config), config, layer_number=0, pg_collection=groups
            )
        gate, weight1, weight2 = (stack.detach() for stack in self.stacks)
        layer.router.weight = nn.Parameter(gate)
        for number, expert in enumerate(layer.experts.local_experts.values()):
            expert.linear_fc1.weight = nn.Parameter(weight1[number])
            expert.linear_fc2.weight = nn.Parameter(weight2[number])
        return layer

    def _mixtral(self, args: argparse.Namespace, peers: Any, kind: str) -> nn.Module:
        config = peers.MixtralConfig(
            hidden_size=args.hidden_size,
            intermediate_size=args.moe_ffn_hidden_size,
            num_local_experts=args.num_experts,
            num_experts_per_tok=args.moe_router_topk,
            experts_implementation=kind,
        )
        with torch.device("meta"):
            block: nn.Module = peers.MixtralSparseMoeBlock(config)
        gate, weight1, weight2 = (nn.Parameter(stack.detach()) for stack in self.stacks)
        block.gate.weight = gate
        block.experts.gate_up_proj, block.experts.down_proj = weight1, weight2
        return block


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach())
    return layer


def _pieces(stack: Tensor) -> Iterator[Any]:
    """Yield ``stack`` and its experts, each with its sum."""
    yield stack
    for number, part in enumerate(stack.detach().unbind()):
        part.main_grad = stack.main_grad[number]  # type: ignore[attr-defined]
        yield part


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(param: Tensor) -> None:
        assert param.grad is not None, "called when there is one"
        total.add_(param.grad)
        param.grad = None

    return add
