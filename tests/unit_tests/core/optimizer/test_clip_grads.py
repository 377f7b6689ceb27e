import math

import pytest
import torch
import torch.distributed as dist

from megatron.core.optimizer.clip_grads import SpreadGradients, clip_divisor, global_grad_norm
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.distributed.stand_in import Oracle, start


@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_norm_counts_every_parameter_once_and_is_bit_equal_on_all_ranks(ranks, ep):
    run_ranks(_norm_equals_oracle, ranks, ep)


def _norm_equals_oracle(ep):
    run, oracle = start(ep), Oracle()
    run.backward(0)
    oracle.backward(0)
    norm = run.optimizer._grad_norm()
    torch.testing.assert_close(norm, oracle.norm(), rtol=1e-12, atol=0.0)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, norm.item().hex())
    assert len(set(every)) == 1


def test_norm_of_a_large_fp32_buffer_is_accurate():
    run_ranks(_large_norm, 1)


def _large_norm():
    flat = torch.randn(4 << 20, generator=torch.Generator().manual_seed(0))
    norm = global_grad_norm([SpreadGradients(dist.group.WORLD, [flat])], flat.device)
    assert norm.dtype == torch.float64
    exact = flat.double().norm().item()
    assert abs(norm.item() - exact) < 1e-8 * exact
    naive = torch.linalg.vector_norm(flat).item()
    assert abs(naive - exact) > 1e-6 * exact  # why it is not taken in one go


@pytest.mark.parametrize(("norm", "divisor"), [(0.0, 1.0), (1.9, 1.0), (4.0, 2.0), (100.0, 50.0)])
def test_gradients_are_divided_down_to_the_largest_norm_and_never_up(norm, divisor):
    found = clip_divisor(torch.tensor(norm, dtype=torch.float64), 2.0)
    assert found.item() == pytest.approx(divisor, rel=1e-6)


def test_the_divisor_of_a_norm_that_is_no_number_is_none_either():
    assert math.isnan(clip_divisor(torch.tensor(float("nan")), 1.0).item())
