"""R1, R2: norms of queries and keys, projection biases and rotations are the same in every layout.

Dropout is on, and batches have masks. A sequence is longer than LongRoPE's original length.
"""

import functools
from typing import Any

import pytest

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import qk_norm
from tests.helpers.layouts import LayoutResult, run_layout
from tests.parity.test_context_parallel import DENSE as DENSE_OF_CP
from tests.parity.test_context_parallel import make_batch
from tests.parity.test_layouts import compare

SLOW = pytest.mark.slow
BASE = DENSE_OF_CP | {
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 6,
    "group_query_attention": True,
    "num_query_groups": 2,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "add_proj_bias": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "rms of heads": {
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "rotary_interleaved": True,
        "rotary_percent": 0.7,
        "rotary_base": 99.5,
    },
    "longrope": {
        "rope_scaling_type": "longrope",
        "rope_scaling_original_max_position_embeddings": 13,  # of two ranks one ends at 12
        "longrope_short_factor": [1.0, 1.0, 1.0],
        "longrope_long_factor": [1.5, 3.0, 7.0],
    },
    "yarn": {
        "position_embedding_type": "yarn",
        "rope_scaling_factor": 8.0,
        "rope_scaling_original_max_position_embeddings": 8,
        "yarn_correction_range_round_to_int": False,
        "yarn_beta_slow": 0.05,
        "rotary_interleaved": True,
    },
    "layernorm of heads": {"qk_layernorm": True, "apply_wd_to_qk_layernorm": True},
    "rms of all heads": {
        "qk_layernorm": True,
        "qk_layernorm_scope": "all_heads",
        "normalization": "RMSNorm",
        "add_qkv_bias": True,
    },
}
TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
SP = {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}


@functools.cache
def one_process(model: str) -> LayoutResult:
    """The run that all layouts of ``model`` are compared with."""
    return run_layout(1, batch_of=make_batch, **(BASE | MODELS[model]))


def check(model: str, world_size: int, **layout: Any) -> None:
    """Compare everything that a short run leaves behind."""
    got = run_layout(world_size, batch_of=make_batch, **(BASE | MODELS[model]), **layout)
    compare(got, one_process(model), weights=True)


QUICK = [
    ("rms of heads", 2, TP2),
    ("rms of heads", 4, TP4 | SP),
    ("layernorm of heads", 2, TP2 | SP),
    ("rms of all heads", 2, TP2 | SP),
    ("rms of all heads", 4, TP4),
    ("rms of heads", 2, CP2),
    ("layernorm of heads", 2, PP2),
    ("longrope", 2, CP2),
]


@pytest.mark.parametrize(("model", "world_size", "layout"), QUICK)
def test_layout_equals_one_process(model, world_size, layout):
    check(model, world_size, **layout)


WIDE = [
    (2, TP2),
    (2, TP2 | SP),
    (4, TP2 | SP | ZERO),
    (4, TP4),
    (4, TP4 | SP),
    (4, TP2 | PP2),
    *((4, TP2 | SP | CP2 | {"cp_comm_type": [kind]}) for kind in ("p2p", "all_gather", "a2a")),
    (4, CP2 | PP2),
    (2, {"use_torch_fsdp2": True}),
    (4, TP2 | {"overlap_grad_reduce": True, "bucket_size": 300}),
]


@SLOW
@pytest.mark.parametrize(("world_size", "layout"), WIDE)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_equals_one_process(model, world_size, layout):
    check(model, world_size, **layout)


@pytest.mark.parametrize(
    ("model", "layout"), [("rms of heads", TP2), ("rms of all heads", TP4), ("rms of heads", TP4)]
)
def test_a_norm_that_learns_from_its_own_heads_only_is_seen(model, layout, monkeypatch):
    one_process(model)
    right = qk_norm.replace
    monkeypatch.setattr(
        qk_norm, "replace", lambda role, **new: right(role, **(new | {"sums_over_tp": False}))
    )
    with pytest.raises(AssertionError, match=r"step 0: (lm_loss|grad_norm)|replicas|disagree"):
        check(model, layout["tensor_model_parallel_size"], **layout)


def test_frequencies_by_the_length_of_a_share_are_seen(monkeypatch):
    one_process("longrope")
    right = RotaryEmbedding.forward

    def of_own_positions(self, positions, like, *, length):
        return right(self, positions, like, length=max(part.stop for part in positions))

    monkeypatch.setattr(RotaryEmbedding, "forward", of_own_positions)
    with pytest.raises(AssertionError, match=r"step 0: (lm_loss|grad_norm)"):
        check("longrope", 2, **CP2)
