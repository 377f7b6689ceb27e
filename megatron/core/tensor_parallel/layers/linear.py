"""The linear layer behind ColumnParallelLinear and RowParallelLinear: parameters with roles."""

import torch
from torch import Tensor, nn

from megatron.core.param_role import Init, ParamRole, set_role


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
    ) -> None:
        """Make the parameters.

        Args:
            input_size: Width of the input.
            output_size: Width of the output.
            init: Draw of the weight; the bias starts at zero.
            dtype: Of weight and bias.
            bias: Have a bias.
            skip_bias_add: Return the bias beside the output instead of adding it, so that a
                caller can fuse the addition.
        """
        super().__init__()
        self.skip_bias_add = skip_bias_add
        self.weight = set_role(
            nn.Parameter(torch.empty(output_size, input_size, dtype=dtype)), ParamRole(init=init)
        )
        self.bias = None
        if bias:
            self.bias = set_role(
                nn.Parameter(torch.empty(output_size, dtype=dtype)),
                ParamRole(init=Init(kind="zeros"), decays=False),
            )

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply ``input_`` [..., input_size].

        Returns:
            The product [..., output_size]; and the bias [output_size] if it was not added.
        """
        if self.skip_bias_add:
            return nn.functional.linear(input_, self.weight), self.bias
        return nn.functional.linear(input_, self.weight, self.bias), None
