import math

import pytest
import torch
import torch.distributed as dist

from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.param_role import logical_tensors
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import TOLERANCES
from tests.unit_tests.core.distributed.stand_in import Oracle, start

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, ep)
STEPS = 3


@pytest.mark.parametrize(("ranks", "ep"), LAYOUTS)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weights_of_every_layout_equal_those_of_one_process(ranks, ep, name):
    run_ranks(_weights_equal_the_oracle, ranks, ep, name)


def _weights_equal_the_oracle(ep, name):
    # eps well above rounding: Adam divides tiny gradients by their size
    config = OptimizerConfig(
        optimizer=name, lr=1e-2, weight_decay=0.1, adam_eps=1e-3, clip_grad=0.02
    )
    run, oracle = start(ep, optimizer=config), Oracle()
    reference = _reference_optimizer(oracle.model, config)
    for step in range(STEPS):
        run.backward(step)
        oracle.backward(step)
        norm = torch.nn.utils.clip_grad_norm_(oracle.model.parameters(), config.clip_grad)
        assert norm > 2 * config.clip_grad
        reference.step()
        result = run.optimizer.step()
        assert result.update_successful
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-12)
        want = oracle.pieces("data")
        for key, weight in run.pieces("data").items():
            torch.testing.assert_close(weight, want[key], **TOLERANCES[torch.float64])
    assert run.optimizer.step_count == STEPS


def _reference_optimizer(model, config):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2 and p is not model.experts.bias1]},
        {"params": [model.norm, model.experts.bias1], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "foreach": False}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.sgd_momentum, **options)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=config.adam_eps, **options)


@pytest.mark.parametrize("bad_rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gradient_that_is_not_finite_on_one_rank_makes_every_rank_skip(bad_rank, dtype):
    run_ranks(_all_skip, 4, bad_rank, dtype)


def _all_skip(bad_rank, dtype):
    run = start(2, dtype)
    run.backward(0)
    assert run.optimizer.step().update_successful
    before = _everything(run)
    run.ddp.zero_grad_buffer()
    if dist.get_rank() == bad_rank:
        # of an expert, before the sum over replicas: the ranks of other experts must hear of it
        run.model.experts.weight1.main_grad[0, 0, 0] = float("inf")
    run.ddp.finish_grad_sync()
    result = run.optimizer.step()
    assert not result.update_successful
    assert not math.isfinite(result.grad_norm)
    for key, tensor in _everything(run).items():
        assert torch.equal(tensor, before[key]), key
    assert run.optimizer.step_count == 1
    run.backward(1)
    assert run.optimizer.step().update_successful


def test_a_loss_that_is_no_number_on_one_rank_makes_every_rank_skip():
    run_ranks(_nan_loss, 2)


def _nan_loss():
    run = start(2)
    run.backward(0, poison=dist.get_rank() == 1)
    assert not run.optimizer.step().update_successful
    assert run.ddp.nonfinite_gradients()


def _everything(run):
    state = {f"model.{k}": v.clone() for k, v in run.pieces("data").items()}
    for name, _, tensors in run.optimizer.named_state():
        state.update({f"{name}.{k}": v.clone() for k, v in tensors.items()})
    return state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_named_state_covers_every_parameter_once_in_its_shape(dtype):
    run_ranks(_named_state, 1, dtype)


def _named_state(dtype):
    run = start(1, dtype)
    shapes = {name: p.shape for name, p in run.model.named_parameters()}
    found = list(run.optimizer.named_state())
    assert [state.name for state in found] == list(shapes)
    expected = {"exp_avg", "exp_avg_sq"} | ({"main_param"} if dtype == torch.bfloat16 else set())
    for name, role, tensors in found:
        assert set(tensors) == expected
        for tensor in tensors.values():
            assert tensor.shape == shapes[name]
            assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert len(list(logical_tensors(name, tensor, role))) in (1, 4)
    run.backward(0)
    run.optimizer.step()
    for _, _, tensors in found:  # views: they follow
        assert tensors["exp_avg"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_run_resumed_from_named_state_goes_on_bit_for_bit(dtype, name):
    run_ranks(_resume, 2, dtype, name)


def _resume(dtype, name):
    config = OptimizerConfig(optimizer=name, lr=1e-2)
    first, second = start(2, dtype, optimizer=config), start(2, dtype, optimizer=config)
    for step in range(2):
        first.backward(step)
        first.optimizer.step()
    saved = _everything(first)
    for key, tensor in second.pieces("data").items():
        tensor.copy_(saved[f"model.{key}"])
    for param_name, _, tensors in second.optimizer.named_state():
        for key, tensor in tensors.items():
            tensor.copy_(saved[f"{param_name}.{key}"])
    second.optimizer.step_count = first.optimizer.step_count
    second.optimizer.after_load()
    for run in (first, second):
        run.backward(2)
        run.optimizer.step()
    want = _everything(first)
    for key, tensor in _everything(second).items():
        assert torch.equal(tensor, want[key]), key


def test_main_weights_follow_the_model_when_only_weights_were_loaded():
    run_ranks(_weights_only, 1)


def _weights_only():
    run = start(1, torch.bfloat16)
    for param in run.model.parameters():
        param.data.fill_(0.5)
    run.optimizer.after_load(with_optim=False)
    for _, _, tensors in run.optimizer.named_state():
        assert (tensors["main_param"] == 0.5).all()


def test_the_model_follows_the_main_weights_when_state_was_loaded():
    run_ranks(_main_loaded, 1)


def _main_loaded():
    run = start(1, torch.bfloat16)
    for _, _, tensors in run.optimizer.named_state():
        tensors["main_param"].fill_(1.001)
    run.optimizer.after_load()
    for param in run.model.parameters():
        assert (param == torch.tensor(1.001).bfloat16()).all()


def test_steps_too_small_for_bf16_add_up_in_the_main_weights():
    run_ranks(_no_drift, 1)


def _no_drift():
    config = OptimizerConfig(optimizer="sgd", sgd_momentum=0.0, lr=1e-4, clip_grad=0.0)
    run = start(1, torch.bfloat16, optimizer=config)
    run.model.norm.data.fill_(1.0)
    run.optimizer.after_load(with_optim=False)
    for _ in range(100):
        run.ddp.zero_grad_buffer()
        run.model.norm.main_grad.fill_(1.0)
        run.ddp.finish_grad_sync()
        run.optimizer.step()
    # bf16 near 1 has steps of 2^-8: 1 - 1e-4 rounds to 1, and a bf16 step would do nothing
    assert (run.model.norm == torch.tensor(0.99).bfloat16()).all()
    main = next(s.tensors["main_param"] for s in run.optimizer.named_state() if s.name == "norm")
    torch.testing.assert_close(main, torch.full_like(main, 0.99), rtol=1e-5, atol=0.0)


def test_weight_decay_reaches_matrices_only():
    run_ranks(_decay, 1)


def _decay():
    run = start(1, optimizer=OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = {k: v.clone() for k, v in run.pieces("data").items()}
    run.ddp.zero_grad_buffer()
    run.ddp.finish_grad_sync()
    run.optimizer.step()
    for key, weight in run.pieces("data").items():
        factor = 1.0 if key == "norm" or key.endswith("bias") else 0.95
        torch.testing.assert_close(weight, before[key] * factor)
