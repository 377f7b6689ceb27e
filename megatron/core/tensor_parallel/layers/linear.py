"""The linear layer behind ColumnParallelLinear and RowParallelLinear: parameters with roles."""

import torch
from torch import Tensor, nn

from megatron.core.param_role import Init, ParamRole, Split, set_role
from megatron.core.tensor_parallel.linear_product import linear
from megatron.core.tensor_parallel.region_entry import RegionEntry


class Linear(nn.Module):
    """``input @ weight.T + bias``, with the bias optionally handed back instead of added.

    Parameters are made on the default device and drawn by their roles (see ``set_role``).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        init: Init,
        dtype: torch.dtype,
        bias: bool = True,
        skip_bias_add: bool = False,
        split: Split | None = None,
        entry: RegionEntry = RegionEntry(),  # noqa: B008  immutable
    ) -> None:
        """Make the parameters, or this rank's slices of them.

        Args:
            input_size: Width of the input, over all ranks.
            output_size: Width of the output, over all ranks.
            init: Draw of the weight; the bias starts at zero.
            dtype: Of weight and bias.
            bias: Have a bias.
            skip_bias_add: Return the bias beside the output instead of adding it, so that a
                caller can fuse the addition.
            split: How the weight is split; the bias is, if it is split along dim 0.
            entry: Ranks that multiply the same input by their slices.
        """
        super().__init__()
        self.skip_bias_add, self.entry = skip_bias_add, entry
        of_bias = split if split is not None and split.dim == 0 else None
        self.weight = _parameter(
            (output_size, input_size), dtype, ParamRole(init=init, split=split)
        )
        self.bias = None
        if bias:
            role = ParamRole(init=Init(kind="zeros"), decays=False, split=of_bias)
            self.bias = _parameter((output_size,), dtype, role)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply ``input_`` [..., input_size].

        Returns:
            The product [..., output_size]; and the bias [output_size] if it was not added.
        """
        if self.skip_bias_add:
            return linear(input_, self.weight, None, self.entry), self.bias
        return linear(input_, self.weight, self.bias, self.entry), None


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, role: ParamRole) -> nn.Parameter:
    here = shape if role.split is None else role.split.local_shape(shape)
    return set_role(nn.Parameter(torch.empty(here, dtype=dtype)), role)
