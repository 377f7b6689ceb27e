"""Factors, caps and norms of the residual stream in every layout equal one process, to 1e-12."""

import functools
from typing import Any

import pytest

from megatron.core.tensor_parallel.cross_entropy import LogitTransform
from megatron.core.transformer import torch_norm
from tests.helpers.layouts import LayoutResult, run_layout
from tests.parity.test_layouts import compare

SLOW = pytest.mark.slow
FACTORS: dict[str, Any] = {
    "embedding_multiplier": 3.5,
    "residual_multiplier": 0.22,
    "logits_multiplier": 0.3,
    "final_logit_softcapping": 1.5,
}
RMS = {"normalization": "RMSNorm", "position_embedding_type": "rope", "num_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "factors, tied": FACTORS,
    "sandwich about 1": RMS
    | {
        "sandwich_norm": True,
        "layernorm_zero_centered_gamma": True,
        "final_logit_softcapping": 2.0,
        "untie_embeddings_and_output_weights": True,
        "moe_layer_freq": [0, 1],
    },
    "parallel, one norm": {"parallel_residual": True, "parallel_residual_shared_norm": True},
    "parallel, sandwich, factors": FACTORS
    | RMS
    | {"parallel_residual": True, "sandwich_norm": True, "layernorm_zero_centered_gamma": True},
}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp": (2, {"tensor_model_parallel_size": 2}),
    "sp": (2, SP),
    "cp": (2, CP),
    "pp": (2, PP),
    "ep": (2, EP),
    "zero bubble": (2, PP | {"pipeline_schedule": "zb-h1"}),
    "overlapped experts": (2, EP | {"overlap_moe_expert_parallel_comm": True}),
    "zero 3": (2, {"use_torch_fsdp2": True}),
    "recomputed": (
        2,
        EP
        | {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "sp and pp": (4, SP | PP),
    "sp and ep": (4, SP | EP | {"expert_tensor_parallel_size": 1}),
    "sp and cp": (4, SP | CP),
    "cp and pp": (4, CP | PP),
    "ep and pp": (4, EP | PP),
}
QUICK = [
    ("sandwich about 1", "sp"),
    ("factors, tied", "zero bubble"),
    ("parallel, one norm", "overlapped experts"),
]
WIDE = [
    pytest.param(model, layout, marks=SLOW)
    for model in MODELS
    for layout in LAYOUTS
    if (model, layout) not in QUICK
]


@pytest.mark.parametrize(("model", "layout"), [*QUICK, *WIDE])
def test_layout_equals_one_process(model: str, layout: str) -> None:
    world_size, options = LAYOUTS[layout]
    got = run_layout(world_size, optimizer="sgd", **(MODELS[model] | options))
    compare(got, one_process(model), weights=True)


@functools.cache
def one_process(model: str) -> LayoutResult:
    """The run that all layouts of ``model`` are compared with."""
    return run_layout(1, optimizer="sgd", **MODELS[model])


def test_a_norm_whose_gradient_is_of_one_rank_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    want = one_process("sandwich about 1")
    vector = torch_norm._vector

    def alone(config: Any, size: int, kind: str) -> Any:
        config.sequence_parallel = False
        made = vector(config, size, kind)
        config.sequence_parallel = True
        return made

    monkeypatch.setattr(torch_norm, "_vector", alone)
    with pytest.raises(AssertionError, match="layernorm"):
        compare(
            run_layout(2, optimizer="sgd", **(MODELS["sandwich about 1"] | SP)), want, weights=True
        )


def test_a_cap_without_its_slope_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reference of one process too: the gradient is compared with the formula elsewhere."""
    want = one_process("factors, tied")
    right = LogitTransform.apply_

    def flat(self: LogitTransform, logits: Any) -> None:
        right(self, logits)

    monkeypatch.setattr(LogitTransform, "apply_", flat)
    with pytest.raises(AssertionError):
        compare(run_layout(1, optimizer="sgd", **MODELS["factors, tied"]), want, weights=True)
