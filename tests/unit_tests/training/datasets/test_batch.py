import torch

from megatron.training.datasets.batch import Batch


def sample(number: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return {name: torch.full((3,), number) for name in names} | more


def test_samples_are_stacked_in_order() -> None:
    batch = Batch.of_samples([sample(5), sample(7)], (50, 70))
    assert batch.tokens.tolist() == [[5] * 3, [7] * 3]
    assert batch.sample_ids == (50, 70)
    assert batch.attention_mask is None


def test_moving_a_batch_moves_every_tensor() -> None:
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    batch = Batch.of_samples([sample(5, attention_mask=mask)], (0,))
    assert batch.attention_mask is not None
    assert batch.attention_mask.shape == (1, 1, 3, 3)
    moved = batch.to("meta")
    assert moved.attention_mask is not None
    assert {moved.tokens.device.type, moved.attention_mask.device.type} == {"meta"}
    assert moved.sample_ids == (0,)
    assert Batch.of_samples([sample(5)], (0,)).to("meta").attention_mask is None
