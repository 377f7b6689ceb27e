"""A tiny model with every kind of parameter that data parallelism treats apart, and its oracle.

Tied embedding, a norm, stacked experts spread over ``ep`` ranks, and a side matrix that only some
samples use. Every value is a function of names and sample numbers, never of a rank.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.parallel_layout import ParallelLayout
from megatron.core.param_role import Init, ParamRole, logical_tensors, role_of, set_role
from megatron.core.process_groups_config import ProcessGroupCollection

VOCABULARY, HIDDEN, FFN, EXPERTS, SEQUENCE = 11, 6, 5, 4, 3
SAMPLES = 8  # of one optimizer step, over all ranks
BUCKET = 70  # elements: several buckets


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[dist.get_rank(ctx.group)], None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x.chunk(group.size())[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx, grad):
        return _AllGather.forward(ctx, grad, ctx.group), None


def draw(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3


class StandIn(nn.Module):
    """Scores of the next token: embedding, norm, one expert per token id, embedding again."""

    def __init__(self, expert_ids: tuple[int, ...], dtype: torch.dtype, ep_group=None):
        super().__init__()
        self.expert_ids, self.ep_group = expert_ids, ep_group
        stacked = {"is_expert": True, "expert_ids": expert_ids}
        count = len(expert_ids)
        self.experts = nn.Module()
        plain = Init()
        for owner, name, shape, role in [
            (self, "embedding", (VOCABULARY, HIDDEN), ParamRole(init=plain)),
            (self, "side", (HIDDEN, HIDDEN), ParamRole(init=plain)),
            (self, "norm", (HIDDEN,), ParamRole(init=plain, decays=False)),
            (
                self.experts,
                "weight1",
                (count, FFN, HIDDEN),
                ParamRole(init=plain, expert_name="fc1.weight", **stacked),
            ),
            (
                self.experts,
                "bias1",
                (count, FFN),
                ParamRole(init=plain, expert_name="fc1.bias", decays=False, **stacked),
            ),
            (
                self.experts,
                "weight2",
                (count, HIDDEN, FFN),
                ParamRole(init=plain, expert_name="fc2.weight", **stacked),
            ),
        ]:
            owner.register_parameter(
                name, set_role(nn.Parameter(torch.empty(shape, dtype=dtype)), role)
            )
        with torch.no_grad():
            for name, param in self.named_parameters():
                for key, piece in logical_tensors(name, param, role_of(param)):
                    piece.copy_(draw(key, piece.shape, dtype))

    def forward(self, tokens: Tensor, uses_side: bool) -> Tensor:
        """Sum over tokens of the loss of predicting ``tokens[:, 1:]``, an [.] scalar."""
        inputs, labels = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1)
        hidden = self.embedding[inputs] * self.norm
        if uses_side:
            hidden = hidden + hidden @ self.side
        hidden = hidden + self._experts(hidden, inputs % EXPERTS)
        logits = hidden @ self.embedding.t()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def _experts(self, hidden: Tensor, expert_of_token: Tensor) -> Tensor:
        if self.ep_group is not None:
            hidden = _AllGather.apply(hidden, self.ep_group)
            expert_of_token = _AllGather.apply(expert_of_token, self.ep_group)
        out = torch.zeros_like(hidden)
        bank = self.experts
        for place, expert in enumerate(self.expert_ids):
            mask = (expert_of_token == expert).to(hidden.dtype)[:, None]
            inner = torch.tanh(hidden @ bank.weight1[place].t() + bank.bias1[place])
            out = out + mask * (inner @ bank.weight2[place].t())
        return out if self.ep_group is None else _ReduceScatter.apply(out, self.ep_group)


def tokens_of(sample: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + sample)
    return torch.randint(VOCABULARY, (1, SEQUENCE + 1), generator=generator)


def uses_side(sample: int) -> bool:
    return sample % SAMPLES == 0  # one sample of a step, so one rank


class Oracle:
    """One process, plain autograd, all samples; what every layout must equal."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.model = StandIn(tuple(range(EXPERTS)), dtype)

    def backward(self, step: int) -> None:
        for param in self.model.parameters():
            param.grad = torch.zeros_like(param)
        for sample in range(step * SAMPLES, (step + 1) * SAMPLES):
            loss = self.model(tokens_of(sample), uses_side(sample))
            (loss / (SAMPLES * SEQUENCE)).backward()

    def norm(self) -> Tensor:
        return torch.cat([param.grad.flatten() for param in self.model.parameters()]).norm()

    def pieces(self, what: str) -> dict[str, Tensor]:
        """``what``: "grad" or "data", by logical name."""
        return {
            key: piece
            for name, param in self.model.named_parameters()
            for key, piece in logical_tensors(name, getattr(param, what), role_of(param))
        }


@dataclass
class Run:
    """A rank of a layout under test."""

    model: StandIn
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    pg: ProcessGroupCollection

    def backward(self, step: int, *, poison: bool = False) -> None:
        """Forward and backward of this rank's samples, one a microbatch; sums the gradients."""
        rank, size = dist.get_rank(), dist.get_world_size()
        microbatches = SAMPLES // size
        self.ddp.zero_grad_buffer()
        for number in range(microbatches):
            sample = step * SAMPLES + number * size + rank
            loss = self.ddp(tokens_of(sample), uses_side(sample)) / (SAMPLES * SEQUENCE)
            if poison:
                loss = loss * float("nan")
            if number < microbatches - 1:
                with self.ddp.no_sync():
                    loss.backward()
            else:
                loss.backward()
        finalize_model_grads(self.ddp)

    def pieces(self, what: str) -> dict[str, Tensor]:
        """``what``: "main_grad" or "data", by logical name; this rank's experts only."""
        return {
            key: piece
            for name, param in self.model.named_parameters()
            for key, piece in logical_tensors(name, getattr(param, what), role_of(param))
        }


def start(
    ep: int,
    dtype: torch.dtype = torch.float64,
    *,
    overlap: bool = False,
    optimizer: OptimizerConfig | None = None,
) -> Run:
    """Build model, buffers and optimizer on this rank of the default group."""
    layout = ParallelLayout(world_size=dist.get_world_size(), ep=ep)
    pg = ProcessGroupCollection.create(layout)
    own = EXPERTS // ep
    first = dist.get_rank(pg.ep) * own
    model = StandIn(tuple(range(first, first + own)), dtype, pg.ep)
    config = DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=BUCKET)
    ddp = DistributedDataParallel(config, model, pg_collection=pg)
    made = get_megatron_optimizer(optimizer or OptimizerConfig(lr=1e-2), ddp, pg_collection=pg)
    return Run(model, ddp, made, pg)
