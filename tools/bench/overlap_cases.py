"""What overlap hides, case by case: steps over a slow link with compute of a known length.

Computation sleeps (``Pause``), so that other load on the machine does not move the figures; all
around it is what trains: buffers, optimizer, MoE layer, collectives. Each case can be stepped with
its overlap on and off, and tells what it computed, to the bit.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.optimizer.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import Init, ParamRole, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tools.bench.slow_group import LINK

BOTH = (False, True)


class Times(NamedTuple):
    """Lengths in seconds."""

    compute: float
    """Of a layer's forward; its backward takes twice as long."""
    transfer: float
    """Of one bucket, or of the rows of one all-to-all."""


class Case(NamedTuple):
    """One overlap, ready to be stepped."""

    step: Callable[[bool], None]
    """Make a step, with the overlap or without."""
    result: Callable[[bool], list[Tensor]]
    """What the steps with the overlap, or without, have computed."""
    seconds_per_byte: dict[str, float]
    """What makes one transfer as long as asked for; see ``Link``."""


class Pause(torch.autograd.Function):
    """The identity, which takes time in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, what: str, seconds: float) -> Tensor:
        """Sleep ``seconds``, and twice that in backward; note both as ``what``."""
        ctx.what, ctx.seconds = what, seconds
        LINK.note(f"{what} forward")
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """See ``forward``."""
        LINK.note(f"{ctx.what} backward")
        time.sleep(2 * ctx.seconds)
        return grad, None, None


class PausingLayer(nn.Module):
    """``tanh(x w)`` that takes a known time."""

    def __init__(self, number: int, width: int, seconds: float) -> None:
        """Draw a weight [width, width] from the number of the layer."""
        super().__init__()
        rng = torch.Generator().manual_seed(number)
        self.weight = set_role(nn.Parameter(torch.empty(width, width)), ParamRole(init=Init()))
        self.weight.data.copy_(torch.randn(width, width, generator=rng) / width**0.5)
        self.number, self.seconds = number, seconds

    def forward(self, x: Tensor) -> Tensor:
        """Map [rows, width] to [rows, width]."""
        y = torch.tanh(x @ self.weight.t())
        return Pause.apply(y, f"layer {self.number}", self.seconds)


class PausingModel(nn.Module):
    """Layers one after another, in a list as those of a transformer."""

    def __init__(self, layers: int, width: int, seconds: float) -> None:
        """Build ``layers`` layers of ``width``."""
        super().__init__()
        self.layers = nn.ModuleList(PausingLayer(n, width, seconds) for n in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers."""
        for layer in self.layers:
            x = layer(x)
        return x


class _Trained:
    """A model over data ranks with its optimizer, and a step of it."""

    def __init__(self, layers: int, width: int, seconds: float, **options: bool) -> None:
        model = PausingModel(layers, width, seconds)
        groups = ProcessGroupCollection.create(ParallelLayout(world_size=dist.get_world_size()))
        config = DistributedDataParallelConfig(bucket_size=width * width, **options)
        self.ddp = DistributedDataParallel(config, model, pg_collection=groups)
        plain = OptimizerConfig(lr=0.01, clip_grad=0.0)
        self.optimizer = get_megatron_optimizer(plain, self.ddp, pg_collection=groups)
        self.width, self._steps = width, 0

    def step(self) -> None:
        """Forward, backward, reduction and optimizer."""
        rng = torch.Generator().manual_seed(100 * self._steps + dist.get_rank())
        self._steps += 1
        self.ddp.zero_grad_buffer()
        self.ddp(torch.randn(4, self.width, generator=rng)).square().sum().backward()
        self.ddp.finish_grad_sync()
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for _, param in self.ddp.trainable_parameters()]


def gradient_reduce(times: Times, layers: int, width: int) -> Case:
    """``--overlap-grad-reduce``: the sum of a bucket under the backward of the layers below."""
    runs = {on: _Trained(layers, width, times.compute, overlap_grad_reduce=on) for on in BOTH}
    return Case(
        step=lambda on: runs[on].step(),
        result=lambda on: runs[on].weights(),
        seconds_per_byte={"all_reduce": times.transfer / (4 * width * width)},
    )


def parameter_gather(times: Times, layers: int, width: int) -> Case:
    """``--overlap-param-gather``: weights of a bucket under the forward of the layers below."""
    zero = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    runs = {
        on: _Trained(layers, width, times.compute, overlap_param_gather=on, **zero) for on in BOTH
    }
    return Case(
        step=lambda on: runs[on].step(),
        result=lambda on: runs[on].weights(),
        seconds_per_byte={"all_gather": times.transfer / (4 * width * width)},
    )


class _Experts:
    """A MoE layer whose shared experts take a known time, in two halves."""

    def __init__(self, tokens: int, width: int, seconds: float, *, overlap: bool) -> None:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=width,
            num_attention_heads=1,
            num_moe_experts=4,
            moe_ffn_hidden_size=width,
            moe_shared_expert_intermediate_size=width,
            moe_shared_expert_overlap=overlap,
            moe_aux_loss_coeff=[0.0],
            expert_model_parallel_size=dist.get_world_size(),
            add_bias_linear=False,
            init_method_std=0.1,
        )
        groups = ProcessGroupCollection.create(config.layout(dist.get_world_size()))
        spec = get_moe_module_spec(config)
        self.layer = build_module(spec, config, layer_number=1, pg_collection=groups)
        for n, (_, param) in enumerate(sorted(self.layer.named_parameters())):
            rng = torch.Generator().manual_seed(n)
            param.data.copy_(torch.randn(param.shape, generator=rng) * 0.1)
        shared = self.layer.shared_experts
        for name, part in (("first half", shared.linear_fc1), ("second half", shared.linear_fc2)):
            part.register_forward_hook(pausing(f"shared experts, {name}", seconds))
        self.tokens, self.width, self._kept = tokens, width, [torch.zeros(())]

    def step(self) -> None:
        """Forward and backward of new tokens."""
        rng = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(self.tokens, 1, self.width, generator=rng).requires_grad_()
        self.layer.zero_grad()
        output, _ = self.layer(x, ForwardContext(same_num_tokens=True))
        output.square().sum().backward()
        grads = [param.grad for param in self.layer.parameters()]
        self._kept = [output.detach(), *(g for g in (x.grad, *grads) if g is not None)]

    def kept(self) -> list[Tensor]:
        return self._kept


def pausing(what: str, seconds: float) -> Callable[..., Any]:
    """Return a forward hook that makes a module with two outputs take its time."""

    def pause(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return Pause.apply(output[0], what, seconds), output[1]

    return pause


def expert_all_to_all(times: Times, tokens: int, width: int) -> Case:
    """``--moe-shared-expert-overlap``: rows on their way under the shared experts."""
    runs = {on: _Experts(tokens, width, times.compute, overlap=on) for on in BOTH}
    rows_bytes = 4 * tokens * 2 * width  # top-2, fp32
    return Case(
        step=lambda on: runs[on].step(),
        result=lambda on: runs[on].kept(),
        seconds_per_byte={"all_to_all": times.transfer / rows_bytes},
    )
