"""Expert banks: GroupedMLP computes all experts of this rank together, SequentialMLP one by one.

Both hold the same logical tensors (see ``ParamRole.expert_ids``), so checkpoints and initial
weights are interchangeable. Probs are applied to the activation, before the second matrix.

With expert tensor parallelism a rank holds a slice of the ffn of each of its experts: rows of the
first matrix, columns of the second. Its output is a part, to be summed over ``expt_tp``.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.core.extensions import torch_native
from megatron.core.extensions.registry import resolve
from megatron.core.param_role import GATED_PARTS, Init, ParamRole, Split, role_of, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers.linear import Linear
from megatron.core.tensor_parallel.weight_split import split_over
from megatron.core.transformer.activations import activation_of
from megatron.core.transformer.config.activation import SWIGLU
from megatron.core.transformer.init_rules import input_init, output_init
from megatron.core.transformer.moe.activated_product import activated_product
from megatron.core.transformer.moe.compiled_experts import compiled_experts
from megatron.core.transformer.moe.expert_activation import (
    IN_TORCH,
    Activation,
    weighted_activation,
)
from megatron.core.transformer.moe.expert_loop import ExpertWeights, looped_experts
from megatron.core.transformer.moe.fused_on_cuda import cuda_activation
from megatron.core.transformer.moe.fused_swiglu import fused_swiglu
from megatron.core.transformer.moe.output_bias import add_output_bias, adds_output_bias
from megatron.core.transformer.precision import compute_dtype, params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig


class GroupedMLP(nn.Module):
    """The experts of this rank as one stacked weight for each projection.

    Every parameter gets a gradient in every step, zeros for an expert without tokens. ffn is that
    of this rank.
    """

    weight1: nn.Parameter
    """[num_local_experts, ffn, h]; 2 * ffn when gated, first gate, then up."""
    weight2: nn.Parameter
    """[num_local_experts, h, ffn]."""
    bias1: nn.Parameter | None
    """[num_local_experts, ffn or 2 * ffn]."""
    bias2: nn.Parameter | None
    """[num_local_experts, h]; weighted by the prob, as the rest of an expert's output is."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Make the parameters, drawn by their roles (see ``set_role``).

        Args:
            num_local_experts: Experts of this rank.
            config: Widths, activation, biases and initialisation.
            pg_collection: Its ``ep`` rank says which experts these are, its ``expt_tp`` rank which
                slice of them.
        """
        super().__init__()
        self.kind = config.activation_kind
        self.grouped_mm = resolve("grouped_mm", config.moe_grouped_mm_backend)
        self.loops_on_cpu = config.moe_grouped_mm_backend == "auto"
        self.fused = config.moe_fused_activation
        self.on_cuda = cuda_activation(config)
        if self.fused == "compiled":
            self._activation(params_dtype(config))  # fails here, if at all
        ids = local_expert_ids(num_local_experts, pg_collection)
        self.adds_bias2 = adds_output_bias(pg_collection)
        hidden, ffn, dtype = config.moe_hidden_size, config.moe_ffn_size, params_dtype(config)
        inner = ffn * (2 if self.kind.gated else 1)
        splits = expert_splits(config, pg_collection)
        matrices = {
            "weight1": ("linear_fc1.weight", (inner, hidden), input_init(config)),
            "weight2": ("linear_fc2.weight", (hidden, ffn), output_init(config)),
        }
        vectors = {
            "bias1": ("linear_fc1.bias", (inner,), Init(kind="zeros")),
            "bias2": ("linear_fc2.bias", (hidden,), Init(kind="zeros")),
        }
        self.bias1 = self.bias2 = None
        for name, (piece, shape, init) in {
            **matrices,
            **(vectors if config.has_mlp_bias else {}),
        }.items():
            split = splits[piece]
            role = ParamRole(
                init=init,
                is_expert=True,
                expert_ids=ids,
                expert_name=piece,
                split=split,
                decays=piece.endswith("weight"),
            )
            here = shape if split is None else split.local_shape(shape)
            param = nn.Parameter(torch.empty(num_local_experts, *here, dtype=dtype))
            setattr(self, name, set_role(param, role))

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Run each row through its expert and weight the result.

        Args:
            permuted_local_hidden_states: [num_recv, h], grouped by local expert.
            tokens_per_expert: [num_local_experts], int64; sums to num_recv.
            permuted_probs: [num_recv].

        Returns:
            [num_recv, h], this rank's part of a sum over ``expt_tp``; and None, for no bias is
            left to add.
        """
        rows = permuted_local_hidden_states
        probs = permuted_probs.to(compute_dtype(rows.dtype))
        if self.loops_on_cpu and rows.device.type == "cpu":
            weights = ExpertWeights(self.weight1, self.weight2, self.bias1, self.bias2)
            compiled = None
            if self.fused != "off" and self.kind == SWIGLU:
                compiled = compiled_experts(rows, weights)
            if compiled is not None:
                return compiled(rows, tokens_per_expert, probs, weights), None
            output = looped_experts(
                rows,
                tokens_per_expert,
                probs,
                weights,
                kind=self.kind,
                adds_bias2=self.adds_bias2,
                activation=self._activation(rows.dtype),
            )
            return output, None
        return self.grouped_experts(rows, tokens_per_expert, probs), None

    def _activation(self, dtype: torch.dtype) -> Activation:
        """Return what computes the activation where experts are looped over."""
        asked = self.fused == "compiled"
        if not asked and (self.fused == "off" or self.kind != SWIGLU):
            return IN_TORCH
        return fused_swiglu(dtype, required=asked)

    def grouped_experts(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        """Compute ``forward`` by two grouped matrix products, without waiting for the device.

        ``probs`` are fp32, or fp64 for fp64 rows. Returns [num_recv, h].
        """
        inner = self.grouped_mm(rows, self.weight1, tokens_per_expert)
        if self.bias1 is None or self.bias2 is None:
            return self._second_product(inner, probs, tokens_per_expert)
        member = self._membership(tokens_per_expert, rows)
        inner = torch.addmm(inner, member, self.bias1)
        output = self._second_product(inner, probs, tokens_per_expert)
        weights = member * probs.unsqueeze(1).to(member.dtype)
        return add_output_bias(output, weights, self.bias2, adds=self.adds_bias2)

    def _second_product(self, inner: Tensor, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Activate ``inner`` [num_rows, ffn or 2 * ffn] and multiply by the second matrices."""
        if self.grouped_mm is torch_native.grouped_mm:
            return activated_product(
                inner,
                probs,
                self.weight2,
                tokens_per_expert,
                kind=self.kind,
                activation=self.on_cuda,
            )
        active = weighted_activation(inner, probs, kind=self.kind)  # which the package keeps
        output: Tensor = self.grouped_mm(active, self.weight2, tokens_per_expert)
        return output

    @staticmethod
    def _membership(tokens_per_expert: Tensor, rows: Tensor) -> Tensor:
        """[num_rows, num_local_experts]: 1 at the expert of each row, in the dtype of ``rows``.

        Multiplied by biases it gives each row its own, with a gradient summed in a fixed order.
        """
        num_rows, ends = rows.shape[0], tokens_per_expert.cumsum(0)
        place = torch.arange(num_rows, device=rows.device).unsqueeze(1)
        return ((place < ends) & (place >= ends - tokens_per_expert)).to(rows.dtype)


class ExpertMLP(nn.Module):
    """One expert, or this rank's slice of it, the readable way."""

    def __init__(self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        kind = config.activation_kind
        self.activation = activation_of(kind)
        self.adds_bias2 = adds_output_bias(pg_collection)
        hidden, dtype = config.moe_hidden_size, params_dtype(config)
        ffn = config.moe_ffn_size // pg_collection.expt_tp.size()
        bias = config.has_mlp_bias
        self.linear_fc1 = Linear(
            hidden,
            ffn * (2 if kind.gated else 1),
            init=input_init(config),
            dtype=dtype,
            bias=bias,
        )
        self.linear_fc2 = Linear(
            ffn, hidden, init=output_init(config), dtype=dtype, bias=bias, skip_bias_add=True
        )
        _mark_as_expert(self, expert_splits(config, pg_collection))

    def forward(self, rows: Tensor, probs: Tensor) -> Tensor:
        """Return prob * expert(row) for ``rows`` [n, h] and ``probs`` [n] (fp32 or fp64)."""
        inner, _ = self.linear_fc1(rows)
        active = self.activation(inner.to(probs.dtype))
        weight = probs.unsqueeze(1)
        output, bias = self.linear_fc2((active * weight).to(rows.dtype))
        result: Tensor = output
        if bias is None:
            return result
        biases, adds = bias.unsqueeze(0), self.adds_bias2
        return add_output_bias(result, weight.to(rows.dtype), biases, adds=adds)


class SequentialMLP(nn.Module):
    """The experts of this rank one after another: readable, slow, for comparison."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """See ``GroupedMLP``."""
        super().__init__()
        ids = local_expert_ids(num_local_experts, pg_collection)
        self.local_experts = nn.ModuleDict(
            {str(expert): ExpertMLP(config, pg_collection=pg_collection) for expert in ids}
        )

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """See ``GroupedMLP.forward``."""
        sizes = tokens_per_expert.tolist()
        probs = permuted_probs.to(compute_dtype(permuted_local_hidden_states.dtype))
        outputs: Sequence[Tensor] = [
            expert(rows, weights)
            for expert, rows, weights in zip(
                self.local_experts.values(),
                permuted_local_hidden_states.split(sizes),
                probs.split(sizes),
                strict=True,
            )
        ]
        return torch.cat(list(outputs)), None


def local_expert_ids(
    num_local_experts: int, pg_collection: ProcessGroupCollection
) -> tuple[int, ...]:
    """Return the global ids of this rank's experts: one block of neighbours."""
    first = pg_collection.ep.rank() * num_local_experts
    return tuple(range(first, first + num_local_experts))


def expert_splits(
    config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> dict[str, Split | None]:
    """Return how each tensor of an expert is split over the ranks that share it, by its name."""
    ffn = config.moe_ffn_size
    parts = (ffn, ffn) if config.gated_linear_unit else (ffn,)
    names = GATED_PARTS if config.gated_linear_unit else ()
    fc1 = split_over("expt_tp", pg_collection, dim=0, parts=parts, names=names)
    return {
        "linear_fc1.weight": fc1,
        "linear_fc1.bias": fc1,
        "linear_fc2.weight": split_over("expt_tp", pg_collection, dim=1, parts=(ffn,)),
        "linear_fc2.bias": None,
    }


def _mark_as_expert(module: nn.Module, splits: dict[str, Split | None]) -> None:
    for name, param in module.named_parameters():
        set_role(param, replace(role_of(param), is_expert=True, split=splits[name]))
