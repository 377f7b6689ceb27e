"""Experts by one call of C++ against fp64 and against the loop, in outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.cpu_kernels import choice
from megatron.core.grad_sink import offer_grad_sink
from megatron.core.transformer.config.activation import SWIGLU
from megatron.core.transformer.moe import compiled_experts as module
from megatron.core.transformer.moe.compiled_experts import compiled_experts
from megatron.core.transformer.moe.expert_loop import ExpertWeights, looped_experts
from megatron.core.transformer.moe.experts import GroupedMLP
from megatron.core.weight_grad_queue import WeightGradQueue
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import make_groups, moe_config

H, FFN = 64, 160
SIZES = [(3, 0, 18, 133), (0, 0, 0, 0), (1, 0, 0, 0), (16, 32, 128, 17), (5, 1030, 0, 2)]


class Sink:
    """The sum of one weight's gradients."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __call__(self) -> Tensor:
        return self.total

    def put_off(self) -> None:
        """Nobody waits."""

    settle = put_off


def _weights() -> ExpertWeights:
    rng = torch.Generator().manual_seed(3)
    weight1 = torch.randn(4, 2 * FFN, H, generator=rng) / H**0.5
    weight2 = torch.randn(4, H, FFN, generator=rng) / FFN**0.5
    return ExpertWeights(weight1.bfloat16(), weight2.bfloat16(), None, None)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if compiled_experts(torch.empty(1, H, dtype=torch.bfloat16), _weights()) is None:
        torch.set_num_threads(before)
        pytest.skip("needs a C++ compiler and a processor with tiles of bf16")
    yield
    torch.set_num_threads(before)


def _inputs(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(sum(sizes))
    rows, grad = (torch.randn(sum(sizes), H, generator=rng).bfloat16() for _ in range(2))
    return rows, torch.rand(sum(sizes), generator=rng), grad


def _compiled(rows: Tensor, sizes: Tensor, probs: Tensor, weights: ExpertWeights) -> Tensor:
    experts = compiled_experts(rows, weights)
    assert experts is not None
    return experts(rows, sizes, probs, weights)


def _looped(rows: Tensor, sizes: Tensor, probs: Tensor, weights: ExpertWeights) -> Tensor:
    return looped_experts(rows, sizes, probs, weights, kind=SWIGLU)


def _results(compute: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    rows, probs, grad = _inputs(sizes)
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [rows.to(dtype), probs.to(wide), *(w.to(dtype) for w in _weights()[:2])]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = compute(leaves[0], torch.tensor(sizes), leaves[1], ExpertWeights(*leaves[2:], None, None))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_are_no_further_from_fp64_than_the_loop(sizes):
    exact = _results(_looped, sizes, torch.float64)
    found = [_results(way, sizes, torch.bfloat16) for way in (_compiled, _looped)]
    for want, got, looped in zip(exact, *found, strict=True):
        assert got.dtype == looped.dtype
        error, error_of_loop = ((x.double() - want).norm() for x in (got, looped))
        assert error <= 1.05 * error_of_loop + 1e-6
        assert error <= 0.02 * want.norm()


def test_rows_do_not_depend_on_their_company():
    rows, probs, grad = _inputs((0, 300, 0, 0))
    found = []
    for first, count in ((0, 300), (7, 5), (100, 141)):
        own = slice(first, first + count)
        leaves = [x[own].clone().requires_grad_() for x in (rows, probs)]
        out = _compiled(leaves[0], torch.tensor([0, count, 0, 0]), leaves[1], _weights())
        got = [out.detach(), *torch.autograd.grad(out, leaves, grad[own])]
        found = found or got
        for part, whole in zip(got, found, strict=True):
            assert torch.equal(part, whole[own])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bad_row_reaches_no_other_row_and_no_other_expert(value):
    sizes, bad = (5, 7, 0, 4), 8
    clean = _results(_compiled, sizes, torch.bfloat16)

    def spoilt(rows: Tensor, *others: Any) -> Tensor:
        mark = torch.zeros_like(rows)
        mark[bad] = value
        return _compiled(rows + mark, *others)

    dirty = _results(spoilt, sizes, torch.bfloat16)
    for got, want in zip(dirty[:3], clean[:3], strict=True):
        assert torch.equal(got[[0, 7, 9, 15]], want[[0, 7, 9, 15]])
        assert not got[bad].isfinite().all()
    for got, want in zip(dirty[3:], clean[3:], strict=True):
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
        assert not got[1].isfinite().all()


def _into_sinks(dtype: torch.dtype, *, later: bool) -> list[Tensor]:
    weights = _weights()
    leaves = [w.requires_grad_() for w in weights[:2]]
    sums = [torch.ones_like(w, dtype=dtype) for w in leaves]
    for leaf, total in zip(leaves, sums, strict=True):
        offer_grad_sink(leaf, Sink(total))
    for sizes in SIZES:
        rows, probs, grad = _inputs(sizes)
        out = _compiled(rows.requires_grad_(), torch.tensor(sizes), probs, weights)
        if later:
            queue = WeightGradQueue()
            with queue.collecting():
                out.backward(grad)
            queue.run()
        else:
            out.backward(grad)
    assert all(leaf.grad is None for leaf in leaves)
    return sums


@pytest.mark.parametrize("later", [False, True])
def test_gradients_are_added_to_sums_now_or_later(later):
    wide, narrow = (_into_sinks(t, later=later) for t in (torch.float32, torch.bfloat16))
    want = [1.0 + sum(_results(_looped, s, torch.float64)[n] for s in SIZES) for n in (3, 4)]
    for total, rounded, exact in zip(wide, narrow, want, strict=True):
        assert (total - exact).norm() < 5e-3 * exact.norm()
        assert (rounded - exact).norm() < 2e-2 * exact.norm()
    if later:
        for total, at_once in zip(wide, _into_sinks(torch.float32, later=False), strict=True):
            torch.testing.assert_close(total, at_once, rtol=1e-5, atol=1e-4)


def test_what_it_cannot_compute_is_left_to_the_loop():
    rows, weights = _inputs((2, 0, 0, 0))[0], _weights()
    narrow = ExpertWeights(weights.weight1[:, :48], weights.weight2[:, :, :24], None, None)
    biased = weights._replace(bias1=torch.zeros(4, 2 * FFN), bias2=torch.zeros(4, H))
    assert compiled_experts(rows, weights) is not None
    for other_rows, other in ((rows.float(), weights), (rows, narrow), (rows, biased)):
        assert compiled_experts(other_rows, other) is None
    assert compiled_experts(rows.to("meta"), weights) is None
    with choice.using("torch"):
        assert compiled_experts(rows, weights) is None
    torch.set_num_threads(2)
    assert compiled_experts(rows, weights) is None


def test_sizes_that_do_not_fit_never_reach_c():
    rows, probs, _ = _inputs((2, 0, 0, 0))
    for sizes in ([1, 0, 0, 0], [1, 1], [3, 0, 0, 0]):
        with pytest.raises(AssertionError):
            _compiled(rows, torch.tensor(sizes), probs, _weights())


class _Count(TorchDispatchMode):
    """Counts calls of torch."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _calls() -> None:
    counts = {}
    torch.set_num_threads(1)
    for fused, expert_count in (("auto", 4), ("auto", 32), ("off", 4)):
        config = moe_config(
            bf16=True, hidden_size=64, moe_ffn_hidden_size=96, moe_fused_activation=fused
        )
        bank = GroupedMLP(expert_count, config, pg_collection=make_groups())
        for p in bank.parameters():
            torch.nn.init.normal_(p)
        rows = torch.randn(64, 64).bfloat16().requires_grad_()
        sizes = torch.full((expert_count,), 64 // expert_count)
        compiled_experts(rows, _weights())  # tried out now
        with _Count() as count:
            bank(rows, sizes, torch.ones(64))[0].sum().backward()
        counts[fused, expert_count] = count.number
    assert counts["auto", 32] == counts["auto", 4]
    assert counts["auto", 4] < counts["off", 4] / 2


def test_calls_of_torch_do_not_grow_with_the_number_of_experts():
    run_ranks(_calls, 1)


def test_code_that_computes_something_else_is_found_out(monkeypatch, tmp_path):
    text = module.SOURCE.read_text()
    header = module.SOURCE.with_name("swiglu.h")
    (tmp_path / header.name).write_text(header.read_text())
    right = "pack(all->weight2 + e * f * h, f, h, h, f, panels2)"
    assert right in text
    (tmp_path / "wrong.cpp").write_text(text.replace(right, right.replace("weight2", "weight1")))
    monkeypatch.setattr(module, "SOURCE", tmp_path / "wrong.cpp")
    with pytest.raises(module.BackendError, match="something else"):
        module._made()
