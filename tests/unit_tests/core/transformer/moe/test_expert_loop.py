"""The loop for CPUs equals the grouped products for other devices, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core.grad_sink import offer_grad_sink
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.moe.expert_loop import ROW_MULTIPLE, padded_size
from megatron.core.transformer.moe.experts import GroupedMLP
from tests.helpers.ranks import run_ranks
from tests.reference.activations import OPTIONS
from tests.unit_tests.core.transformer.moe.layers import H, make_groups, moe_config

SIZES = [(3, 0, 18, 16), (0, 0, 0, 0), (1, 0, 0, 0)]
SHAPES = [
    {"swiglu": True},
    {"swiglu": True, "add_bias_linear": True},
    {"add_bias_linear": True},
    *OPTIONS.values(),
    {**OPTIONS["gpt_oss"], "add_mlp_bias": True},
]


def _bank(config) -> GroupedMLP:
    bank = GroupedMLP(4, config, pg_collection=make_groups())
    init_weights(nn.ModuleDict({"experts": bank}), seed=3)
    with torch.no_grad():
        for p in bank.parameters():
            p.mul_(20.0).add_(0.01)
    return bank


def _results(bank: GroupedMLP, forward: Any, sizes: tuple[int, ...]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(4)
    rows = torch.randn(sum(sizes), H, generator=rng).double().requires_grad_()
    probs = torch.rand(sum(sizes), generator=rng).double().requires_grad_()
    out = forward(rows, torch.tensor(sizes), probs)
    wanted = [rows, probs, *bank.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


def _agree(shape: dict[str, Any]) -> None:
    bank = _bank(moe_config(fp64=True, **({"swiglu": False} | shape)))
    for sizes in SIZES:
        looped = _results(bank, lambda *args: bank(*args)[0], sizes)
        grouped = _results(bank, bank.grouped_experts, sizes)
        torch.testing.assert_close(looped, grouped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_loop_and_grouped_products_agree(shape):
    run_ranks(_agree, 1, shape)


def _company() -> None:
    bank = _bank(moe_config())
    rows = torch.randn(48, H, generator=torch.Generator().manual_seed(1))
    probs = torch.ones(48)
    together, _ = bank(rows, torch.tensor([0, 48, 0, 0]), probs)
    alone, _ = bank(rows[:5], torch.tensor([0, 5, 0, 0]), probs[:5])
    assert ROW_MULTIPLE % 16 == 0
    assert torch.equal(alone, together[:5])


def test_rows_do_not_depend_on_their_company():
    run_ranks(_company, 1)


def _into_sums(shape: dict[str, Any], dtype: dict[str, bool]) -> None:
    config = moe_config(**dtype, **({"swiglu": False} | shape))
    bank, twin = _bank(config), _bank(config)
    wide = torch.float64 if config.fp64 else torch.float32
    sums = [torch.zeros_like(p, dtype=wide) for p in bank.parameters()]
    for p, total in zip(bank.parameters(), sums, strict=True):
        offer_grad_sink(p, lambda total=total: total)
    tolerance = {"fp64": 1e-14, "bf16": 1e-6}.get(next(iter(dtype), ""), 1e-6)
    want = [torch.zeros_like(total) for total in sums]
    for step, sizes in enumerate(SIZES):
        rng = torch.Generator().manual_seed(step)
        rows = torch.randn(sum(sizes), H, generator=rng).to(bank.weight1.dtype)
        probs = torch.rand(sum(sizes), generator=rng).to(wide)
        inputs = []
        for one in (bank, twin):
            inputs.append((rows.clone().requires_grad_(), probs.clone().requires_grad_()))
            one(inputs[-1][0], torch.tensor(sizes), inputs[-1][1])[0].square().sum().backward()
        for got, expected in zip(*inputs, strict=True):
            assert torch.equal(got.grad, expected.grad)
        for p, other, total in zip(bank.parameters(), twin.parameters(), want, strict=True):
            assert p.grad is None, "the sink has it"
            total.add_(other.grad)
            other.grad = None
    for got, total in zip(sums, want, strict=True):
        assert total.any()
        torch.testing.assert_close(got, total, rtol=tolerance, atol=tolerance * total.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [{"fp64": True}, {}, {"bf16": True}])
def test_gradients_added_to_sinks_are_those_that_would_be_returned(shape, dtype):
    run_ranks(_into_sums, 1, shape, dtype)


def _bad_neighbour(dtype: dict[str, bool]) -> None:
    bank = _bank(moe_config(**dtype))
    sizes, bad = torch.tensor([5, 7, 0, 4]), 8  # a row of expert 1, which fills up expert 0
    rows = torch.randn(16, H, generator=torch.Generator().manual_seed(6)).to(bank.weight1.dtype)
    found = []
    for value in (1.0, float("inf"), float("nan")):
        rows[bad] = value
        seen, probs = rows.clone().requires_grad_(), torch.ones(16).requires_grad_()
        out, _ = bank(seen, sizes, probs)
        upstream = torch.ones_like(out)
        upstream[bad] = value
        grads = torch.autograd.grad(out, (seen, probs, bank.weight1, bank.weight2), upstream)
        rest = [torch.cat((t[:bad], t[bad + 1 :])) for t in (out.detach(), *grads[:2])]
        found.append([*rest, *(grad[[0, 2, 3]] for grad in grads[2:])])
        assert grads[2][1].isfinite().all() == (value == 1.0)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [{"fp64": True}, {}, {"bf16": True}])
def test_an_infinite_row_reaches_no_other_row_and_no_other_expert(dtype):
    run_ranks(_bad_neighbour, 1, dtype)


def test_few_numbers_of_rows_are_compiled_for_bf16():
    sizes = range(1, 4097)
    padded = [padded_size(size, torch.bfloat16) for size in sizes]
    assert all(
        size <= to and to % ROW_MULTIPLE == 0 for size, to in zip(sizes, padded, strict=True)
    )
    assert all(to - size < max(16, size / 16) for size, to in zip(sizes, padded, strict=True))
    assert len({to for to in padded if to > 256}) == 4 * 16
    assert padded_size(1025, torch.float32) == 1040  # nothing is compiled for fp32
    assert padded_size(0, torch.bfloat16) == 0
