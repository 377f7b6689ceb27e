import pytest
import torch
from torch import nn

from megatron.core.param_role import Init, ParamRole, deferred_init, logical_tensors, set_role


@pytest.mark.parametrize(("kind", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_a_parameter_is_drawn_when_it_gets_its_role(kind, value):
    param = nn.Parameter(torch.full((4,), float("nan")))
    assert set_role(param, ParamRole(init=Init(kind=kind))).tolist() == [value] * 4


def test_normal_weights_have_their_spread_and_the_global_seed_decides_them():
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(set_role(nn.Parameter(torch.empty(10_000)), ParamRole(init=Init(std=0.3))))
    assert torch.equal(*draws)
    assert draws[0].std().item() == pytest.approx(0.3, rel=0.05)


def test_a_deferred_parameter_is_left_alone_and_no_generator_moves():
    before = torch.get_rng_state()
    with deferred_init():
        param = set_role(nn.Parameter(torch.full((4,), 7.0)), ParamRole(init=Init()))
    assert param.tolist() == [7.0] * 4
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stacked_parameter_has_one_logical_tensor_for_each_global_expert():
    role = ParamRole(init=Init(), expert_ids=(4, 5), expert_name="linear_fc1.weight")
    stacked = torch.arange(6.0).view(2, 3)
    named = dict(logical_tensors("mlp.experts.weight1", stacked, role))
    assert list(named) == [f"mlp.experts.local_experts.{e}.linear_fc1.weight" for e in (4, 5)]
    assert named["mlp.experts.local_experts.5.linear_fc1.weight"].tolist() == [3.0, 4.0, 5.0]
