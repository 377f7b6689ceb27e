import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.grad_scaler import (
    ConstantGradScaler,
    DynamicGradScaler,
    build_grad_scaler,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig

BAD, GOOD = "x", "."


def scaler(initial=1024.0, *, smallest=1.0, window=4, hysteresis=2) -> DynamicGradScaler:
    return DynamicGradScaler(
        initial, min_scale=smallest, growth_interval=window, hysteresis=hysteresis
    )


def scales(made, steps: str) -> list[float]:
    """Return the scale after each step, GOOD or BAD."""
    found = []
    for step in steps:
        made.update(found_inf=step == BAD)
        found.append(made.scale)
    return found


@pytest.mark.parametrize(
    ("options", "steps", "wanted"),
    [
        # it halves at the second, and at each one from then on
        ({}, "xxxx", [1024, 512, 256, 128]),
        ({"hysteresis": 1}, "xx", [512, 256]),
        ({"hysteresis": 3}, "xxxx", [1024, 1024, 512, 256]),
        # good steps in between do not forgive, until the scale has doubled
        ({}, "x...x", [1024, 1024, 1024, 1024, 512]),
        ({}, "x....xx", [1024, 1024, 1024, 1024, 2048, 2048, 1024]),
        # only good ones in a row count
        ({}, "...x...", [1024] * 7),
        ({}, "........", [1024, 1024, 1024, 2048, 2048, 2048, 2048, 4096]),
        ({"window": 1}, "..", [2048, 4096]),
        ({"smallest": 300, "hysteresis": 1}, "xxx", [512, 300, 300]),
    ],
)
def test_the_scale_follows_from_the_steps(options, steps, wanted):
    assert scales(scaler(**options), steps) == wanted


def test_a_scale_can_fall_until_it_is_the_smallest():
    made = scaler(4.0, hysteresis=1)
    assert made.can_fall
    scales(made, "x")
    assert made.can_fall
    scales(made, "x")
    assert made.scale == 1.0
    assert not made.can_fall
    scales(made, "....")
    assert made.can_fall


@given(
    before=st.text([BAD, GOOD], max_size=30),
    after=st.text([BAD, GOOD], min_size=1, max_size=30),
    window=st.integers(1, 5),
    hysteresis=st.integers(1, 4),
)
def test_a_saved_scaler_goes_on_as_the_unbroken_one(before, after, window, hysteresis):
    unbroken = scaler(window=window, hysteresis=hysteresis)
    scales(unbroken, before)
    resumed = scaler(2.0**32, window=window, hysteresis=hysteresis)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    assert resumed.scale == unbroken.scale
    assert scales(resumed, after) == scales(unbroken, after)
    assert resumed.state_dict() == unbroken.state_dict()


def test_a_state_holds_the_scale_and_both_counts():
    made = scaler(hysteresis=3)
    scales(made, "x..")
    assert made.state_dict() == {"scale": 1024, "growth_tracker": 2, "hysteresis_tracker": 2}
    assert scaler(1.5).state_dict() == {"scale": 1.5, "growth_tracker": 0, "hysteresis_tracker": 2}


def test_a_loaded_state_keeps_the_limits_of_this_run():
    made = scaler(smallest=64, hysteresis=1, window=3)
    made.load_state_dict({"scale": 16.0, "growth_tracker": 5, "hysteresis_tracker": 4})
    assert made.scale == 64
    assert scales(made, "x") == [64]
    made.load_state_dict({"scale": 128.0, "growth_tracker": 5, "hysteresis_tracker": 4})
    assert scales(made, ".") == [256]


def test_a_constant_scale_stays_and_needs_no_state():
    made = ConstantGradScaler(3.0)
    assert scales(made, "xx.....") == [3.0] * 7
    assert made.state_dict() is None
    assert not made.can_fall
    made.load_state_dict(scaler().state_dict())
    assert made.scale == 3.0


def test_a_state_that_is_not_there_leaves_a_fresh_scale():
    made = scaler(8.0)
    made.load_state_dict(None)
    assert made.state_dict() == scaler(8.0).state_dict()


def test_options_choose_the_scaler():
    dynamic = build_grad_scaler(
        OptimizerConfig(initial_loss_scale=2.0**10, hysteresis=1, loss_scale_window=2.0), fp16=True
    )
    assert scales(dynamic, "x..") == [512, 512, 1024]
    assert build_grad_scaler(OptimizerConfig(), fp16=True).scale == 2.0**32
    assert build_grad_scaler(OptimizerConfig(min_loss_scale=2.0**32), fp16=True).can_fall is False
    assert scales(build_grad_scaler(OptimizerConfig(loss_scale=8.0), fp16=True), "x") == [8]
    assert scales(build_grad_scaler(OptimizerConfig(), fp16=False), "x") == [1]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_power_of_two_leaves_a_flat_step_as_it_is_bit_for_bit(name, clip, dtype):
    plain, scaled = (_flat_run(name, clip, dtype, scale) for scale in (1.0, 2.0**20))
    assert plain[0] == scaled[0]
    assert all(map(torch.equal, plain[1], scaled[1]))
    third = _flat_run(name, clip, dtype, 1000.0)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert third[0] == pytest.approx(plain[0], rel=close)
    torch.testing.assert_close(third[1][0], plain[1][0], rtol=close, atol=close)


def _flat_run(name: str, clip: float, dtype: torch.dtype, scale: float):
    """Make four steps of scaled gradients, the third not finite; return norms and tensors."""
    draw = torch.Generator().manual_seed(1)
    main = torch.randn(2048, generator=draw).to(dtype)
    main.grad = torch.zeros_like(main)
    made = FlatStep(
        OptimizerConfig(optimizer=name, lr=1e-2, clip_grad=clip),
        [{"params": [main], "weight_decay": 0.1}],
    )
    norms = []
    for step in range(4):
        main.grad.copy_(torch.randn(2048, generator=draw)).mul_(scale)
        if step == 2:
            main.grad[7] = float("inf")
        norms.append(made.step(torch.linalg.vector_norm(main.grad.double()), scale))
    assert made.step_count == 3
    assert norms[2] == float("inf")
    return norms, [main, *made.moments(main).values()]


def test_clipping_is_of_the_gradient_without_its_scale():
    main = torch.zeros(1024)
    main.grad = torch.zeros_like(main)
    main.grad[0] = 4.0 * 2.0**16
    made = FlatStep(
        OptimizerConfig(optimizer="sgd", sgd_momentum=0.0, lr=1.0, clip_grad=1.0),
        [{"params": [main], "weight_decay": 0.0}],
    )
    assert made.step(torch.tensor(4.0 * 2.0**16, dtype=torch.float64), 2.0**16) == 4.0
    assert main[0].item() == pytest.approx(-1.0, rel=1e-5)
