"""Both expert banks: the same names, the same numbers, gradients for experts without tokens."""

import pytest
import torch
from torch import nn

from megatron.core.param_role import logical_tensors, role_of
from megatron.core.tensor_parallel.weight_init import init_weights, tensor_hashes
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from tests.helpers.ranks import run_ranks
from tests.reference.activations import OPTIONS
from tests.unit_tests.core.transformer.moe.layers import FFN, H, make_groups, moe_config

SHAPES = [
    {"swiglu": True},
    {"swiglu": True, "add_bias_linear": True},
    {"swiglu": False, "add_bias_linear": True},
    {"swiglu": False, "add_mlp_bias": True, **OPTIONS["gpt_oss"]},
    {"swiglu": False, **OPTIONS["squared_relu"]},
    {"swiglu": True, "moe_ffn_hidden_size": 7},  # not 16 bytes wide: no grouped_mm
]
SIZES = [(3, 0, 18, 1), (0, 0, 0, 0), (0, 0, 0, 5)]


def _banks(config):
    groups = make_groups()
    banks = [bank(4, config, pg_collection=groups) for bank in (GroupedMLP, SequentialMLP)]
    for bank in banks:
        init_weights(nn.ModuleDict({"experts": bank}), seed=3)
        with torch.no_grad():
            for p in bank.parameters():
                p.mul_(20.0).add_(0.01)  # biases start at zero
    return banks


def _run(bank, config, sizes):
    rng = torch.Generator().manual_seed(11)
    dtype = getattr(torch, config.params_dtype_name)
    rows = torch.randn(sum(sizes), H, generator=rng).to(dtype).requires_grad_()
    probs = torch.rand(sum(sizes), generator=rng).to(torch.promote_types(dtype, torch.float32))
    probs.requires_grad_()
    out, bias = bank(rows, torch.tensor(sizes), probs)
    assert bias is None
    assert out.dtype == dtype
    out.sum().backward()  # an expanded gradient, which grouped_mm alone refuses
    gradients = {"rows": rows.grad, "probs": probs.grad}
    for name, p in bank.named_parameters(prefix="experts"):
        assert p.grad is not None, f"no gradient of {name}"
        gradients.update(logical_tensors(name, p.grad, role_of(p)))
    return out, gradients


def _agree(shape: dict, fp64: bool) -> None:
    config = moe_config(**shape, fp64=fp64)
    tolerance = 1e-12 if fp64 else 2e-6
    for sizes in SIZES:
        results = [_run(bank, config, sizes) for bank in _banks(config)]
        (out, gradients), (want_out, want) = results
        torch.testing.assert_close(out, want_out, rtol=tolerance, atol=tolerance)
        assert gradients.keys() == want.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fp64", [True, False])
def test_grouped_and_sequential_experts_agree(shape, fp64):
    run_ranks(_agree, 1, shape, fp64)


def _hashes() -> None:
    config = moe_config(add_bias_linear=True)
    full = make_groups(1)
    split = make_groups(2)
    for bank in (GroupedMLP, SequentialMLP):
        whole = nn.ModuleDict({"experts": bank(8, config, pg_collection=full)})
        part = nn.ModuleDict({"experts": bank(4, config, pg_collection=split)})
        init_weights(whole, seed=1)
        init_weights(part, seed=1)
        own = tensor_hashes(part)
        assert len(own) == 16
        assert own.items() <= tensor_hashes(whole).items()


def test_initial_weights_depend_on_the_global_expert_only():
    run_ranks(_hashes, 2)


def _roles() -> None:
    for bank in _banks(moe_config(add_bias_linear=True)):
        for name, p in bank.named_parameters():
            role = role_of(p)
            assert role.is_expert, name
            assert role.decays == ("weight" in name), name


def test_expert_parameters_are_reduced_as_experts_and_biases_do_not_decay():
    run_ranks(_roles, 1)


def _bf16() -> None:
    config = moe_config(bf16=True, add_bias_linear=True)
    for sizes in SIZES:
        (out, gradients), (want_out, want) = (_run(b, config, sizes) for b in _banks(config))
        torch.testing.assert_close(out, want_out, rtol=3e-2, atol=3e-2)
        for key, gradient in gradients.items():
            assert gradient.isfinite().all()
            torch.testing.assert_close(gradient, want[key], rtol=5e-2, atol=0.2)


def test_bf16_experts_agree_too():
    run_ranks(_bf16, 1)


def _backends() -> None:
    for bias in (False, True):
        found = []
        for backend, loops in (("auto", True), ("torch_native", False)):
            config = moe_config(add_bias_linear=bias, moe_grouped_mm_backend=backend)
            bank, _ = _banks(config)
            kinds = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kinds=kinds: kinds.append(x.shape) or x, lambda x: x
            ):
                out, gradients = _run(bank, config, (5, 0, 7, 0))
            # one product of all experts keeps one tensor of all rows, a loop keeps one of each
            assert ((12, 2 * FFN) in kinds) is not loops
            found.append((out, gradients))
        torch.testing.assert_close(*found)


def test_the_backend_asked_for_is_what_computes():
    run_ranks(_backends, 1)
