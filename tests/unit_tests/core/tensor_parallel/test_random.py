"""Dropout masks: functions of seed, sample, layer and site; right in mean; nothing global."""

import itertools

import pytest
import torch

from megatron.core.tensor_parallel.random import SampleRng

HERE = {"layer": 3, "site": "mlp", "batch_dim": 1}


def _drop(seed: int, samples: tuple[int, ...], p: float = 0.25, **place: object) -> torch.Tensor:
    ones = torch.ones(40, len(samples), 50, dtype=torch.float64)
    return SampleRng(seed, samples).dropout(ones, p, **{**HERE, **place})


def test_mask_of_a_sample_is_the_same_in_any_batch() -> None:
    together = _drop(1, (4, 5, 6))
    assert torch.equal(together[:, 2:], _drop(1, (6,)))
    assert torch.equal(together[:, [1, 0]], _drop(1, (5, 4)))


def test_seed_sample_layer_and_site_each_change_the_mask() -> None:
    masks = [
        _drop(1, (4,)),
        _drop(2, (4,)),
        _drop(1, (5,)),
        _drop(1, (4,), layer=4),
        _drop(1, (4,), site="self_attention"),
    ]
    for a, b in itertools.combinations(masks, 2):
        agree = (a == b).double().mean().item()
        assert agree == pytest.approx(0.25**2 + 0.75**2, abs=0.06)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements_is_p_and_the_mean_is_kept(p: float) -> None:
    ones = torch.ones(1000, 1, 1000, dtype=torch.float64)
    out = SampleRng(7, (0,)).dropout(ones, p, **HERE)
    dropped = (out == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p)) ** 0.5 / 1000)
    assert out.mean().item() == pytest.approx(1.0, abs=5 * (p / (1 - p)) ** 0.5 / 1000)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=2e-4)


def test_gradient_is_dropped_and_scaled_like_the_output() -> None:
    x = torch.randn(40, 2, 50, dtype=torch.float64, requires_grad=True)
    out = SampleRng(1, (4, 5)).dropout(x, 0.25, **HERE)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out / x).detach())
    torch.testing.assert_close(x.grad, _drop(1, (4, 5)))


def test_zero_probability_changes_nothing() -> None:
    x = torch.randn(3, 1, 5)
    assert SampleRng(1, (0,)).dropout(x, 0.0, **HERE) is x


def test_global_generator_is_not_touched() -> None:
    state = torch.get_rng_state()
    _drop(1, (4, 5))
    assert torch.equal(state, torch.get_rng_state())


def test_jitter_is_even_between_its_bounds_and_belongs_to_the_sample():
    x = torch.full((40, 3, 50), 2.0, dtype=torch.float64, requires_grad=True)

    def jittered(ids: tuple[int, ...], layer: int = 1) -> torch.Tensor:
        part = x[:, : len(ids)]
        return SampleRng(5, ids).jitter(part, 0.25, layer=layer, site="router", batch_dim=1)

    y = jittered((3, 8, 4))
    assert 1.5 <= y.min() < 1.51
    assert 2.49 < y.max() <= 2.5
    assert y.mean().item() == pytest.approx(2.0, abs=0.02)
    assert y.std().item() == pytest.approx(1.0 / 12**0.5, abs=0.02)
    assert torch.equal(y[:, 1:2], jittered((8,)))
    assert not torch.equal(y, jittered((3, 8, 4), layer=2))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach() / 2)


def test_normal_numbers_belong_to_the_sample() -> None:
    like = torch.zeros(50, 3, 40, dtype=torch.float64)

    def drawn(ids: tuple[int, ...]) -> torch.Tensor:
        return SampleRng(5, ids).normal_like(like[:, : len(ids)], **HERE)

    x = drawn((3, 8, 4))
    assert torch.equal(x[:, 2:], drawn((4,)))
    assert x.mean().item() == pytest.approx(0.0, abs=0.05)
    assert x.std().item() == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(x[:, 0], x[:, 1])
