"""The choices of experts wait for no device, and choose on CUDA as on the CPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron.core.transformer.moe.quantile_balancing import expert_quantiles, quantile_choice
from megatron.core.transformer.moe.router_replay import (
    RouterReplay,
    RouterReplayAction,
    indices_of_map,
    map_of_indices,
)
from megatron.core.transformer.moe.routing import map_of_largest
from megatron.core.transformer.moe.sinkhorn import sinkhorn_ranking

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def _logits() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(300, 16, generator=generator, dtype=torch.float64) * 3


def test_choices_are_those_of_the_cpu_without_waiting():
    cpu, beta = _logits(), torch.linspace(-1.0, 1.0, 16)
    cuda, cuda_beta = cpu.cuda(), beta.cuda()
    torch.cuda.set_sync_debug_mode("error")
    spread = map_of_largest(sinkhorn_ranking(cuda), 3)
    priced = quantile_choice(cuda, 3, cuda_beta)
    asked = expert_quantiles(cuda, 3, cuda_beta)
    indices = indices_of_map(priced, 3)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(spread.cpu(), map_of_largest(sinkhorn_ranking(cpu), 3))
    assert torch.equal(priced.cpu(), quantile_choice(cpu, 3, beta))
    torch.testing.assert_close(asked.cpu(), expert_quantiles(cpu, 3, beta))
    assert torch.equal(map_of_indices(indices, 16), priced)


def test_recording_and_replaying_wait_for_nothing():
    indices, replay = torch.arange(600).view(300, 2).cuda() % 16, RouterReplay(16, 2)
    replay.set_target_indices(indices)
    torch.cuda.set_sync_debug_mode("error")
    replay.action = RouterReplayAction.RECORD
    replay.record(indices, 0)
    replay.action = RouterReplayAction.REPLAY_FORWARD
    replayed = replay.replayed(300, 0, indices.device)
    torch.cuda.set_sync_debug_mode("default")
    assert replayed is not None
    assert torch.equal(replayed, indices)
