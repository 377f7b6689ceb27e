"""The compiled activation against plain autograd in fp64, and what happens where it cannot be."""

import logging
import os

import pytest
import torch

from megatron.core.cpu_kernels import build, choice
from megatron.core.cpu_kernels.build import compiler
from megatron.core.errors import BackendError
from megatron.core.transformer.config.activation import GELU, SWIGLU
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe import fused_swiglu as module
from megatron.core.transformer.moe.expert_activation import IN_TORCH, Activation, ActivationGradient
from megatron.core.transformer.moe.fused_swiglu import fused_swiglu
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    H,
    make_groups,
    make_layer,
    make_reference,
    moe_config,
)
from tests.unit_tests.core.transformer.moe.test_moe_layer import LAYOUTS, _check

DTYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def _inputs(num_rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    inner = 4 * torch.randn(num_rows, 2 * width, generator=rng)
    grad = torch.randn(num_rows, width, generator=rng)
    return [inner.to(dtype), torch.rand(num_rows, generator=rng), grad.to(dtype)]


def _results(way: Activation, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inner, probs, grad = inputs
    made = ActivationGradient(*(torch.full_like(x, torch.nan) for x in inputs))
    out = torch.full_like(grad, torch.nan)
    assert way.activate(inner, probs, kind=SWIGLU, out=out) is out
    way.differentiate(inner, probs, grad, kind=SWIGLU, out=made)
    return [out, *made]


def _wanted(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inner, probs, grad = (x.double() for x in inputs)
    leaves = [inner.requires_grad_(), probs.requires_grad_()]
    gate, up = inner.chunk(2, dim=1)
    out = torch.nn.functional.silu(gate) * up * probs.unsqueeze(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), out.detach()]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (3, 7), (5, 37), (33, 64), (7, 2048)])
def test_values_and_gradients_are_those_of_fp64(dtype, shape):
    inputs = _inputs(*shape, dtype)
    fused, wanted = _results(fused_swiglu(dtype, required=True), inputs), _wanted(inputs)
    for got, in_torch, want in zip(fused, _results(IN_TORCH, inputs), wanted, strict=True):
        assert got.isfinite().all()
        one_rounding = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=one_rounding * 4, atol=1e-4)
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
        assert (
            error <= 1.1 * (in_torch.double() - want).norm() / want.norm().clamp(min=1e-30) + 1e-7
        )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range_of_the_gate_is_right(dtype):
    gate = torch.cat((torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, 3e38])))
    gate = gate.to(dtype).unsqueeze(0)
    inputs = [torch.cat((gate, torch.ones_like(gate)), 1), torch.ones(1), torch.ones_like(gate)]
    got, wanted = _results(fused_swiglu(dtype, required=True), inputs), _wanted(inputs)
    for n in (0, 1, 3):
        close = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got[n].double(), wanted[n], rtol=close, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_seen_and_stays_in_its_row(dtype):
    inputs = _inputs(3, 40, dtype)
    clean = _results(fused_swiglu(dtype), inputs)
    for value in (torch.inf, -torch.inf, torch.nan):
        for spoilt, column in ((0, 3), (0, 43), (2, 39)):  # gate, up, gradient
            bad = [x.clone() for x in inputs]
            bad[spoilt][1, column] = value
            found = _results(fused_swiglu(dtype), bad)
            for got, want in zip(found, clean, strict=True):
                assert torch.equal(got[[0, 2]], want[[0, 2]])
            assert not found[1][1].isfinite().all()
            assert found[0][1].isfinite().all() == (spoilt == 2)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_and_a_result_does_not_depend_on_where(dtype):
    inputs = _inputs(9, 24, dtype)
    want = _results(fused_swiglu(dtype), inputs)
    inner, probs, grad = (torch.cat((x, x), dim=-1) for x in inputs)
    apart = [inner[:, 48:], probs[9:], grad[:, 24:]]
    found = _results(fused_swiglu(dtype), apart)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    some = [x[2:7] for x in inputs]
    for got, whole in zip(_results(fused_swiglu(dtype), some), want, strict=True):
        assert torch.equal(got, whole[2:7])
    strided = [inputs[0], torch.stack((inputs[1], inputs[1]), 1)[:, 0], inputs[2]]
    assert torch.equal(_results(fused_swiglu(dtype), strided)[0], want[0])


@needs_compiler
def test_what_c_must_not_touch_is_refused():
    inner, probs, grad = _inputs(4, 8, torch.float32)
    way = fused_swiglu(torch.float32)
    for bad_inner, bad_probs, out in (
        (inner[:3], probs, grad),
        (inner[:, :15], probs, grad),
        (inner, probs[:3], grad),
        (inner, probs.double(), grad),
        (inner.bfloat16(), probs, grad),
        (inner, probs, torch.empty(8, 4).t()),
        (inner, probs, grad.to("meta")),
    ):
        with pytest.raises(AssertionError):
            way.activate(bad_inner, bad_probs, kind=SWIGLU, out=out)
    with pytest.raises(AssertionError, match="SwiGLU"):
        way.activate(inner, probs, kind=GELU, out=inner)


@pytest.fixture
def nothing_made(monkeypatch):
    """A process that has no kernels yet, and a folder that keeps none."""
    monkeypatch.setattr(choice, "_made", {})
    monkeypatch.setattr(choice, "_failed", {})
    monkeypatch.setenv(build.FOLDER_VARIABLE, "")
    build.kernel_folder.cache_clear()
    yield
    build.kernel_folder.cache_clear()


@needs_compiler
def test_it_is_compiled_once_for_a_dtype(monkeypatch, nothing_made):
    runs, run = [], build.subprocess.run
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: runs.append(a) or run(*a, **k))
    for num_rows in (0, 1, 5, 64):
        for dtype in DTYPES:
            _results(fused_swiglu(dtype), _inputs(num_rows, 16, dtype))
    assert len(runs) == 2


@pytest.fixture
def broken(monkeypatch, request, tmp_path, nothing_made):
    """A machine whose compiler is missing, fails, or makes nothing."""
    command = tmp_path / "broken_cc"
    scripts = {
        "missing": None,
        "failing": "echo 'error: no such processor' >&2\nexit 1\n",
        "making nothing": "exit 0\n",
    }
    if (script := scripts[request.param]) is not None:
        command.write_text(f"#!/bin/sh\n{script}")
        os.chmod(command, 0o700)
    monkeypatch.setenv("CXX", str(command))
    return request.param


@needs_compiler
@pytest.mark.parametrize("broken", ["missing", "failing", "making nothing"], indirect=True)
def test_without_a_compiler_torch_computes_after_one_notice_unless_it_was_asked_for(broken, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert fused_swiglu(torch.float32) is IN_TORCH
    assert [record.message[:56] for record in caplog.records] == [
        "the activation of experts in float32 is not compiled, to"
    ]
    with pytest.raises(BackendError, match="--moe-fused-activation off"):
        fused_swiglu(torch.float32, required=True)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("g * sigmoid(g)", "g * g"),
        ("(1.0f - s)", "(1.0f + s)"),
        ("sum += products", "sum = products"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_code_that_computes_something_else_is_found_out(
    monkeypatch, tmp_path, nothing_made, right, wrong, dtype
):
    header = module.SOURCE.with_name("swiglu.h").read_text()
    assert right in header
    (tmp_path / "swiglu.h").write_text(header.replace(right, wrong))
    (tmp_path / "wrong.cpp").write_text(module.SOURCE.read_text())
    monkeypatch.setattr(module, "SOURCE", tmp_path / "wrong.cpp")
    with pytest.raises(BackendError, match="something else"):
        fused_swiglu(dtype, required=True)


def test_fp64_and_gelu_stay_in_torch_under_auto():
    assert fused_swiglu(torch.float64) is IN_TORCH
    run_ranks(_banks_choose, 1)


def _banks_choose() -> None:
    chosen = {
        name: make_layer(config, make_groups(), make_reference(config)).experts._activation(
            getattr(torch, config.params_dtype_name)
        )
        for name, config in {
            "off": moe_config(moe_fused_activation="off"),
            "gelu": moe_config(swiglu=False),
            "fp64": moe_config(fp64=True),
            "geglu": moe_config(swiglu=False, geglu=True),
            "clamp": moe_config(activation_func_clamp_value=7.0),
            "auto": moe_config(),
        }.items()
    }
    fused = chosen.pop("auto")
    assert all(way is IN_TORCH for way in chosen.values())
    assert (fused is IN_TORCH) == (compiler() is None)


def test_the_choice_of_kernels_rules_unless_it_was_asked_for():
    with choice.using("torch"):
        assert fused_swiglu(torch.float32) is IN_TORCH
        if compiler() is not None:
            assert fused_swiglu(torch.float32, required=True) is not IN_TORCH


def _layers(ep: int) -> None:
    groups = make_groups(ep)
    for options in ({}, {"bf16": True}, {"moe_ffn_hidden_size": 21}, {"add_bias_linear": True}):
        config = moe_config(
            moe_fused_activation="compiled",
            moe_aux_loss_coeff=[0.3],
            moe_z_loss_coeff=0.02,
            **options,
        )
        _check(config, groups, (13, 0, 6, 9)[: torch.distributed.get_world_size()])


@needs_compiler
@pytest.mark.parametrize(("world_size", "ep"), LAYOUTS)
def test_a_layer_equals_the_textbook_layer_on_any_ranks(world_size, ep):
    run_ranks(_layers, world_size, ep)


def _keeps_as_much() -> None:
    kept = []
    for way in ("off", "compiled"):
        config = moe_config(moe_fused_activation=way)
        layer = make_layer(config, make_groups(), make_reference(config))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append((x.shape, x.dtype)) or x, lambda x: x
        ):
            layer(
                torch.randn(9, 1, H, generator=torch.Generator().manual_seed(2)), ForwardContext()
            )
        kept.append(sizes)
    assert kept[0] == kept[1]


@needs_compiler
def test_nothing_more_is_kept_for_backward():
    run_ranks(_keeps_as_much, 1)
