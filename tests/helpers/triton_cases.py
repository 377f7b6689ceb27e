"""Triton's kernels against torch's functions, their twin: the same checks on CUDA and on a CPU.

On a CPU Triton's interpreter computes, which is chosen by TRITON_INTERPRET=1 before triton is
imported, hence in a process of its own: ``python -m tests.helpers.triton_cases`` prints, as JSON,
case -> what failed. The interpreter cuts fp32 off where it writes bf16, a device rounds.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.extensions import triton_ops
from megatron.core.extensions.triton_ops import _kernels as triton_kernels
from megatron.core.transformer.config.activation import SWIGLU
from megatron.core.transformer.moe import permutation
from megatron.core.transformer.moe.expert_activation import activate, differentiate
from megatron.core.transformer.moe.permutation import (
    RowMover,
    add_up_in_torch,
    gather_in_torch,
    permute,
    plan_rows,
    unpermute,
)
from megatron.core.transformer.precision import params_dtype
from tests.unit_tests.core.transformer.moe.layers import (
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)

WIDTHS = (24, 2500)
"""Less than a block of columns, and more than one, neither a power of two."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(device, dtype)


def _same(got: Tensor, want: Tensor, *, exact: bool = False) -> None:
    """Compare; ``exact`` holds but where the interpreter cuts bf16 off."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    cuts = got.dtype == torch.bfloat16 and not got.is_cuda
    if exact and not cuts:
        assert torch.equal(got, want), (got - want).abs().max()
        return
    close = (2 if cuts else 1) * torch.finfo(want.dtype).eps + 4e-6
    error = (got.double() - want.double()).abs()
    assert (error <= close * want.double().abs() + 1e-5 * want.double().abs().max()).all(), (
        error.max()
    )


def check_gather(dtype: torch.dtype, width: int, device: str) -> None:
    """Rows by their index, zeros for a row of padding, in this dtype and in fp32."""
    source = _drawn((9, width), dtype, device, 1)
    index = torch.tensor([3, 0, 8, -1, 3, 9, 7], device=device)
    padding = (index < 0) | (index >= 9)
    for out in (dtype, torch.float32):
        want = gather_in_torch(source, index.clamp(0, 8), out).masked_fill(padding[:, None], 0.0)
        got = triton_ops.gather_rows(source, index, out)
        assert torch.equal(got, want)
    assert triton_ops.gather_rows(source, index[:0], dtype).shape == (0, width)


def check_sum(dtype: torch.dtype, width: int, device: str) -> None:
    """Sums of the rows of a token, bit for bit; tokens without rows, rows of dropped tokens."""
    routing = torch.rand((11, 6), generator=torch.Generator().manual_seed(2)) < 0.4
    routing[4], routing[5] = False, True
    plan = plan_rows(routing.to(device))
    rows = _drawn((len(plan.token_of_row), width), dtype, device, 3)
    for out in (dtype, torch.float32):
        want = add_up_in_torch(rows, plan.slots, out)
        _same(triton_ops.sum_rows(rows, plan.slots, out), want, exact=True)
    assert triton_ops.sum_rows(rows, plan.slots[:, :0], dtype).shape == (0, width)


def check_zero_empty(dtype: torch.dtype, width: int, device: str) -> None:
    """Blocks without rows become zeros, also where NaN was; the others keep their bits."""
    blocks = _drawn((4, 9, width), dtype, device, 10)
    blocks[1], blocks[3] = float("nan"), float("nan")
    counts = torch.tensor([3, 0, 1, 0], device=device)
    want = blocks.masked_fill((counts == 0).view(-1, 1, 1), 0.0)
    assert torch.equal(triton_ops.zero_empty_(blocks, counts), want)
    assert torch.equal(blocks, want)


def check_there_and_back(dtype: torch.dtype, width: int, device: str) -> None:
    """Forward and backward of permutation as dispatchers call it, from strided tokens too."""
    routing = torch.rand((8, 4), generator=torch.Generator().manual_seed(4)) < 0.5
    grad = _drawn((8, width), dtype, device, 6)
    results = []
    for mover in (
        RowMover(triton_ops.gather_rows, triton_ops.sum_rows),
        RowMover(gather_in_torch, add_up_in_torch),
    ):
        plan = plan_rows(routing.to(device), max_rows_per_token=4, mover=mover)
        tokens = _drawn((width, 8), dtype, device, 5).t().requires_grad_()
        out = unpermute(permute(tokens, plan), plan)
        (back,) = torch.autograd.grad(out, tokens, grad)
        results.append((out, back))
    for got, want in zip(*results, strict=True):
        _same(got, want)


def check_swiglu(dtype: torch.dtype, width: int, device: str) -> None:
    """Outputs, gradients and the gradient of each prob; gates so large that exp overflows."""
    inner = _drawn((7, 2 * width), dtype, device, 7) * 3
    inner[0, :4] = torch.tensor([200.0, -200.0, 0.0, 30.0], device=device)
    probs = torch.rand(7, generator=torch.Generator().manual_seed(8)).to(device)
    grad = _drawn((7, width), dtype, device, 9)
    _same(triton_ops.swiglu(inner, probs), activate(inner, probs, kind=SWIGLU))
    got = triton_ops.swiglu_gradient(inner, probs, grad)
    for one, other in zip(got, differentiate(inner, probs, grad, kind=SWIGLU), strict=True):
        _same(one, other)
    assert torch.equal(got[1], triton_ops.swiglu_gradient(inner, probs, grad)[1])
    empty = triton_ops.swiglu_gradient(inner[:0], probs[:0], grad[:0])
    assert [x.shape[0] for x in empty] == [0, 0, 0]


def check_layer(dispatcher: str, options: dict[str, Any], device: str) -> None:
    """A whole MoE layer with the kernels against one without: outputs and all gradients."""
    results = []
    for fused in (True, False):
        config = moe_config(
            bf16=device != "cpu",
            moe_token_dispatcher_type=dispatcher,
            moe_grouped_mm_backend="torch_native",
            bias_swiglu_fusion=fused,
            moe_permute_fusion=fused,
            **options,
        )
        with mock.patch.object(triton_ops, "unusable", return_value=None):
            layer = make_layer(config, make_groups(1), make_reference(moe_config(**options)))
        layer, tokens = layer.to(device), make_tokens(40, params_dtype(config)).detach().to(device)
        tokens.requires_grad_()
        calls = mock.Mock(wraps=triton_kernels())
        with (
            mock.patch.object(triton_ops, "takes", lambda rows: rows.dtype in DTYPES.values()),
            mock.patch.object(triton_ops, "_kernels", return_value=calls),
            mock.patch.object(permutation, "_adds_in_order", return_value=False),
        ):
            out, _ = layer(tokens.view(20, 2, -1))
            out.square().sum().backward()
        used = {call[0] for call in calls.method_calls}
        assert used == (KERNELS if fused else set())
        results.append((out, tokens.grad, *(p.grad for p in layer.parameters())))
    for got, want in zip(*results, strict=True):
        close = 2e-2 if got.dtype == torch.bfloat16 else 1e-5
        assert (got - want).norm() <= close * want.norm()


KERNELS = {"gather_rows", "sum_rows", "swiglu", "swiglu_gradient"}
PADDED = {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True}
LAYERS: dict[str, Callable[[str], None]] = {
    f"layer {dispatcher} {name}": partial(check_layer, dispatcher, options)
    for dispatcher in ("alltoall", "alltoall_dedup", "alltoall_hierarchical", "allgather")
    for name, options in {"topk": {}, "padded": PADDED}.items()
}
CASES: dict[str, Callable[[str], None]] = {
    f"{name} {dtype} {width}": partial(check, DTYPES[dtype], width)
    for name, check in {
        "gather": check_gather,
        "sum": check_sum,
        "there and back": check_there_and_back,
        "swiglu": check_swiglu,
        "zero empty": check_zero_empty,
    }.items()
    for dtype in DTYPES
    for width in WIDTHS
} | LAYERS


def main() -> None:
    """Run every case on the CPU."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it before triton is imported"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    failed = {}
    for name, check in CASES.items():
        try:
            check("cpu")
        except Exception as error:  # noqa: BLE001 - told in the test that asks for it
            failed[name] = repr(error)
    json.dump(failed, sys.stdout)


if __name__ == "__main__":
    main()
