import pytest
import torch

from megatron.core.optimizer import flat_step
from megatron.core.optimizer.flat_step import FlatStep
from megatron.core.optimizer.optimizer_config import OptimizerConfig


def flat(numel=2048, dtype=torch.float32):
    main = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    main.grad = torch.zeros_like(main)
    return main


def set_grad(main, step):
    main.grad.copy_(torch.randn(main.numel(), generator=torch.Generator().manual_seed(step)))
    return torch.linalg.vector_norm(main.grad.double())


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_step_equals_the_plain_torch_step_of_each_parameter(name, clip, dtype):
    config = OptimizerConfig(optimizer=name, lr=1e-2, clip_grad=clip, weight_decay=0.1)
    main = flat(dtype=dtype)
    plain = [torch.nn.Parameter(piece.clone()) for piece in main.split([5, 1043, 1000])]
    if name == "adam":
        reference = torch.optim.AdamW(
            plain, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False
        )
    else:
        reference = torch.optim.SGD(plain, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=False)
    made = FlatStep(config, [{"params": [main], "weight_decay": 0.1}])
    for step in range(5):
        norm = set_grad(main, step)
        for param, grad in zip(plain, main.grad.split([5, 1043, 1000]), strict=True):
            param.grad = grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(plain, clip, foreach=False)
        reference.step()
        assert made.step(norm) == norm.item()
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            main, torch.cat([p.detach() for p in plain]), rtol=tolerance, atol=tolerance
        )
    assert made.step_count == 5


class LikeApex(torch.optim.Optimizer):
    """Adam that neither folds clipping nor skips by itself, and counts steps in its groups."""

    def __init__(self, groups, *, lr, betas, eps):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for main in group["params"]:
                first, second = self.state[main]["exp_avg"], self.state[main]["exp_avg_sq"]
                first.lerp_(main.grad, 1 - beta1)
                second.lerp_(main.grad.square(), 1 - beta2)
                root = (second / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                main.sub_(group["lr"] * first / (1 - beta1 ** group["step"]) / root)


@pytest.fixture(params=["folds", "does not fold"])
def steps(request, monkeypatch):
    if request.param == "does not fold":
        monkeypatch.setattr(flat_step, "resolve", lambda op: {"adam": LikeApex}[op])
    return lambda main: FlatStep(
        OptimizerConfig(lr=1e-2, clip_grad=1.0), [{"params": [main], "weight_decay": 0.0}]
    )


def test_an_optimizer_that_does_not_fold_gets_clipped_gradients(monkeypatch):
    ours, theirs = flat(), flat()
    config = OptimizerConfig(lr=1e-2, clip_grad=1.0)
    folding = FlatStep(config, [{"params": [ours], "weight_decay": 0.0}])
    monkeypatch.setattr(flat_step, "resolve", lambda op: {"adam": LikeApex}[op])
    other = FlatStep(config, [{"params": [theirs], "weight_decay": 0.0}])
    for step in range(3):
        assert folding.step(set_grad(ours, step)) == other.step(set_grad(theirs, step)) > 40
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_changes_nothing(steps, bad):
    main = flat()
    made = steps(main)
    made.step(set_grad(main, 0))
    before = [main.clone(), *[m.clone() for m in made.moments(main).values()]]
    set_grad(main, 1)
    main.grad[7] = bad
    made.step(torch.linalg.vector_norm(main.grad.double()))
    for one, other in zip(before, [main, *made.moments(main).values()], strict=True):
        assert torch.equal(one, other)
    assert made.step_count == 1
    # the next step has the bias correction of a second step
    plain = flat()
    other = steps(plain)
    other.step(set_grad(plain, 0))
    other.step(set_grad(plain, 2))
    made.step(set_grad(main, 2))
    assert torch.equal(main, plain)


def test_state_written_before_any_step_is_continued(steps):
    main = flat()
    made = steps(main)
    for step in range(3):
        made.step(set_grad(main, step))
    resumed_main = main.clone()
    resumed_main.grad = torch.zeros_like(main)
    resumed = steps(resumed_main)
    assert resumed.step_count == 0
    for name, moment in resumed.moments(resumed_main).items():
        assert not moment.any()
        moment.copy_(made.moments(main)[name])
    resumed.step_count = made.step_count
    made.step(set_grad(main, 3))
    resumed.step(set_grad(resumed_main, 3))
    assert torch.equal(main, resumed_main)
    assert resumed.step_count == 4


def test_sgd_without_momentum_has_no_state():
    main = flat()
    made = FlatStep(
        OptimizerConfig(optimizer="sgd", sgd_momentum=0.0, lr=0.5, clip_grad=0.0),
        [{"params": [main], "weight_decay": 0.0}],
    )
    assert made.moments(main) == {}
    before = main.clone()
    made.step(set_grad(main, 0))
    torch.testing.assert_close(main, before - 0.5 * main.grad)
