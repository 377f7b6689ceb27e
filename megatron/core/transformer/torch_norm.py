"""LayerNorm and RMSNorm in torch, with statistics in fp32 (fp64 in fp64).

``F.rms_norm`` is several times slower than ``F.layer_norm`` on the CPU, forward and backward;
there both are compiled (``norm_kernel.py``), or RMSNorm borrows the fused backward of LayerNorm
(see ``_RMSNormOnCPU``). So does a weight that is kept as its difference from 1, on any device:
1 + weight stays in the dtype of statistics.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron.core.param_role import Init, ParamRole, set_role
from megatron.core.transformer.norm_kernel import CompiledNorm, norm_kernel
from megatron.core.transformer.precision import compute_dtype, params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation, scale and shift each row.

    Source: Ba et al. 2016 (arXiv:1607.06450).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = _scale(config, hidden_size)
        self.bias = _vector(config, hidden_size, "zeros")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., h] over its last dimension."""
        if x.is_cuda and not self.zero_centered:
            shape = self.weight.shape
            return nn.functional.layer_norm(x, shape, self.weight, self.bias, self.eps)
        scale = _around_one(self.weight) if self.zero_centered else self.weight
        compiled, out = norm_kernel(x), None
        if compiled is not None:
            out = CompiledNorm.apply(x, scale, self.bias, self.eps, compiled)
        else:
            out = _LayerNormOnCPU.apply(x, scale, self.bias, self.eps)
        return out  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """Divide each row by its root mean square and scale it.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = _scale(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., h] over its last dimension."""
        if x.is_cuda and not self.zero_centered:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        scale = _around_one(self.weight) if self.zero_centered else self.weight
        compiled, out = norm_kernel(x), None
        if compiled is not None:
            out = CompiledNorm.apply(x, scale, None, self.eps, compiled)
        else:
            out = _RMSNormOnCPU.apply(x, scale, self.eps)
        return out  # type: ignore[no-any-return]


def _scale(config: TransformerConfig, size: int) -> nn.Parameter:
    """Make a weight that begins as a factor of 1."""
    return _vector(config, size, "zeros" if config.layernorm_zero_centered_gamma else "ones")


def _around_one(weight: Tensor) -> Tensor:
    """Return the factor that ``weight`` is kept for, in the dtype of statistics."""
    return weight.to(compute_dtype(weight.dtype)) + 1.0


def _vector(config: TransformerConfig, size: int, kind: str) -> nn.Parameter:
    init = Init(kind=kind)  # type: ignore[arg-type]
    role = ParamRole(init=init, decays=False, sums_over_tp=config.sequence_parallel)
    return set_role(nn.Parameter(torch.empty(size, dtype=params_dtype(config))), role)


class _LayerNormOnCPU(torch.autograd.Function):
    """LayerNorm in fp32 or wider that keeps its input in the input's own dtype.

    The kernel for narrower numbers rounds between its steps.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows, hidden = _rows(x), [x.shape[-1]]
        out, mean, rstd = torch.native_layer_norm(
            rows, hidden, weight.to(rows.dtype), bias.to(rows.dtype), eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype  # type: ignore[attr-defined]
        return out.to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
        wide_weight = weight.to(rstd.dtype)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            *(_rows(grad), _rows(x), weight.shape, mean, rstd, wide_weight, wide_weight),
            [True, True, True],
        )
        return dx.to(x.dtype).view(x.shape), dw.to(weight.dtype), db.to(ctx.bias_dtype), None  # type: ignore[attr-defined]


class _RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm in two passes forward, and LayerNorm's fused kernel plus a correction backward.

    With mean 0 and the reciprocal root mean square r in place of a row's statistics, LayerNorm's
    backward gives the gradient of RMSNorm but for a term that its subtraction of the mean adds:
    -r * mean(dy * w) in every element of the row. That term is added back.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows(x)
        mean_square = torch.linalg.vecdot(rows, rows).div_(rows.shape[-1])
        rstd = mean_square.add_(eps).rsqrt_().unsqueeze(-1)  # [n, 1]
        ctx.save_for_backward(x, weight, rstd)
        return (rows * rstd).mul_(weight.to(rows.dtype)).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
        dy, mean, wide_weight = _rows(grad), torch.zeros_like(rstd), weight.to(rstd.dtype)
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            dy, _rows(x), weight.shape, mean, rstd, wide_weight, None, [True, True, False]
        )
        row_mean = (dy @ wide_weight).div_(len(weight)).unsqueeze(-1)
        dx.addcmul_(row_mean, rstd)
        return dx.to(x.dtype).view(x.shape), dw.to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` [..., h] as contiguous rows in the dtype of statistics: [n, h]."""
    return x.reshape(-1, x.shape[-1]).to(compute_dtype(x.dtype)).contiguous()
