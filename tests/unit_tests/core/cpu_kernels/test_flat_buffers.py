"""The compiled step of flat buffers against torch's and against fp64."""

import math

import pytest
import torch
from torch import Tensor

from megatron.core.cpu_kernels.build import compiler
from megatron.core.cpu_kernels.choice import using
from megatron.core.cpu_kernels.flat_buffers import (
    AdamWConstants,
    FlatKernels,
    fill_zero,
    flat_kernels,
)
from megatron.core.optimizer.clip_grads import sum_of_squares
from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.optimizer_config import OptimizerConfig

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
SIZES = [0, 1, 15, 16, 1023, 1024, 5000]


@pytest.fixture(name="kernels")
def _kernels() -> FlatKernels:
    found = flat_kernels(torch.empty(1))
    assert found is not None
    return found


def _numbers(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _constants(step: int, divisor: float = 1.0) -> AdamWConstants:
    return AdamWConstants(step, 1e-2, (0.9, 0.98), 1e-8, 0.1, divisor)


@pytest.mark.parametrize("divisor", [1.0, 3.7])
@pytest.mark.parametrize("size", SIZES)
def test_adamw_is_as_near_to_fp64_as_that_of_torch(
    kernels: FlatKernels, size: int, divisor: float
) -> None:
    ours, first, second = _numbers(size, 0), torch.zeros(size), torch.zeros(size)
    rounded = torch.zeros(size, dtype=torch.bfloat16)
    twins = [ours.clone(), ours.double()]
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}
    others = [torch.optim.AdamW([twin], foreach=False, **options) for twin in twins]
    for step in range(1, 6):
        grad = _numbers(size, step)
        kernels.adamw(ours, grad, first, second, _constants(step, divisor), rounded)
        for twin, other in zip(twins, others, strict=True):
            twin.grad = (grad / divisor).to(twin.dtype)
            other.step()
    torch.testing.assert_close(ours, twins[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.double(), twins[1], rtol=1e-6, atol=1e-7)
    assert torch.equal(rounded, ours.bfloat16())


def test_a_step_is_the_same_bits_wherever_buffers_are_cut(kernels: FlatKernels) -> None:
    size = 3000
    tensors = [_numbers(size, 0), _numbers(size, 1), *torch.zeros(2, size)]
    rounded = torch.zeros(size, dtype=torch.bfloat16)
    parts, narrow = [t.clone() for t in tensors], rounded.clone()
    for step in (1, 2):
        kernels.adamw(*tensors, _constants(step), rounded)
        for start, end in ((0, 7), (7, 1031), (1031, 1031), (1031, 2999), (2999, 3000)):
            pieces = [t[start:end] for t in parts]
            kernels.adamw(*pieces, _constants(step), narrow[start:end])
    for whole, cut in zip([*tensors, rounded], [*parts, narrow], strict=True):
        assert torch.equal(whole, cut)


def test_threads_change_no_bit(kernels: FlatKernels) -> None:
    size = 200_001
    results = []
    for threads in (1, 3):
        tensors = [_numbers(size, 0), _numbers(size, 1), torch.zeros(size), torch.zeros(size)]
        zeros, rounded = torch.ones(size), torch.zeros(size, dtype=torch.bfloat16)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            kernels.adamw(*tensors, _constants(1), rounded)
            kernels.fill_zero(zeros)
            total = torch.tensor(kernels.sum_of_squares(tensors[0]))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(total, sum_of_squares(tensors[0]).to(total.dtype))
        results.append([*tensors, rounded, zeros, total])
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)
    assert not zeros.any()


def test_weights_that_are_no_numbers_stay_so_when_rounded(kernels: FlatKernels) -> None:
    weight = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40, -0.0])
    grad, rounded = torch.zeros(6), torch.zeros(6, dtype=torch.bfloat16)
    constants = AdamWConstants(1, 1e-2, (0.9, 0.98), 1e-8, 0.0)
    kernels.adamw(weight, grad, torch.zeros(6), torch.zeros(6), constants, rounded)
    assert torch.equal(rounded.view(torch.int16)[1:], weight.bfloat16().view(torch.int16)[1:])
    assert rounded[0].isnan()


@pytest.mark.parametrize("size", SIZES)
def test_squares_are_summed_in_fp64_and_zeros_fill_no_more_than_asked(
    kernels: FlatKernels, size: int
) -> None:
    outer = _numbers(size + 2, 3) + 1e3
    inner = outer[1:-1]
    want = inner.double().square().sum().item()
    assert math.isclose(kernels.sum_of_squares(inner), want, rel_tol=1e-13)
    fill_zero(inner)
    assert not inner.any()
    assert outer[[0, -1]].all()


@pytest.mark.parametrize("loss_scale", [1.0, 8.0])
def test_a_flat_step_is_compiled_only_where_it_may_be(loss_scale: float) -> None:
    main, narrow = {}, {}
    for choice in ("torch", "compiled"):
        with using(choice):  # type: ignore[arg-type]
            flat = _numbers(2048, 0)
            flat.grad = torch.zeros(2048)
            main[choice], narrow[choice] = flat, torch.zeros(2048, dtype=torch.bfloat16)
            config = OptimizerConfig(lr=1e-2, clip_grad=1.0)
            groups = [{"params": [flat], "weight_decay": 0.1}]
            made = FlatStep(config, groups, {flat: narrow[choice]})
            assert made.rounds(flat) == (choice == "compiled")
            for step in range(1, 4):
                flat.grad.copy_(_numbers(2048, step))
                made.step(sum_of_squares(flat.grad).sqrt(), loss_scale)
            assert made.optimizer.state[flat]["step"] == 3
    torch.testing.assert_close(main["torch"], main["compiled"], rtol=1e-6, atol=1e-7)
    assert torch.equal(narrow["compiled"], main["compiled"].bfloat16())
    assert not narrow["torch"].any()  # left to whoever steps


def test_other_tensors_are_left_to_torch() -> None:
    for other in (
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(4, device="meta"),
        torch.zeros(4, 2)[:, 0],
    ):
        assert flat_kernels(other) is None
        fill_zero(other)
    with using("torch"):
        assert flat_kernels(torch.zeros(4)) is None
