import pytest
import torch

from megatron.core.extensions.fused_adamw import FusedAdamW


def twins(dtype):
    generator = torch.Generator().manual_seed(3)
    ours = [torch.randn(n, generator=generator).to(dtype) for n in (5, 1043, 2048)]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}

    def groups(params):
        return [
            {"params": params[:2], "weight_decay": 0.1},
            {"params": params[2:], "weight_decay": 0.0},
        ]

    made = FusedAdamW(groups(ours), **settings)
    return ours, made, theirs, torch.optim.AdamW(groups(theirs), **settings, fused=True)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_fused_adamw_of_torch_bit_for_bit(dtype, scaled):
    ours, made, theirs, reference = twins(dtype)
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).to(dtype)
            other.grad = mine.grad.clone()
        for optimizer in (made, reference):
            optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
            # the fourth step is skipped
            optimizer.found_inf = torch.tensor(float(number == 3)) if scaled else None
            optimizer.grad_scale = torch.tensor(3.0) if scaled else None
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other.detach())
        found = reference.state[other]
        for name, value in made.state[mine].items():
            assert torch.equal(value, found[name]), name
    assert made.state[ours[0]]["step"] == (4 if scaled else 5)
