import pytest
import torch

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.param_role import role_of
from tests.unit_tests.core.dist_checkpointing.stand_in import StandIn


def test_experts_are_named_by_their_global_id() -> None:
    tensors = model_tensors(StandIn((2, 3)))
    assert set(tensors) == {
        "model.dense",
        "model.bias",
        "model.counts",
        "model.experts.local_experts.2.linear_fc1.weight",
        "model.experts.local_experts.3.linear_fc1.weight",
    }


def test_tensors_are_views_of_the_model() -> None:
    model = StandIn((0, 1))
    model_tensors(model)["model.experts.local_experts.1.linear_fc1.weight"].fill_(7)
    assert model.experts.weight1[1].eq(7).all()
    assert model.experts.weight1[0].eq(0).all()


def test_buffers_that_are_not_persistent_stay_out() -> None:
    assert "model.scratch" not in model_tensors(StandIn((0,)))


def test_optimizer_states_are_split_like_their_parameter() -> None:
    model = StandIn((2, 3))
    role = role_of(model.experts.weight1)
    state = {"exp_avg": torch.zeros_like(model.experts.weight1)}
    tensors = optimizer_tensors([("experts.weight1", role, state)])
    assert set(tensors) == {
        f"optimizer.exp_avg.experts.local_experts.{expert}.linear_fc1.weight" for expert in (2, 3)
    }


def test_two_tensors_of_one_name_are_refused() -> None:
    model = StandIn((2, 2))
    with pytest.raises(AssertionError, match="two tensors are named"):
        model_tensors(model)
