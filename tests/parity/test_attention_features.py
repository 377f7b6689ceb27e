"""R1, R2: windows, sinks and capped scores train as on one process in every layout.

Weights are dropped; of the two layers one may have no window; a sequence of 16 ends windows of 6
positions within the slices of ranks.
"""

import functools
import math
from typing import Any

import pytest

from megatron.core.transformer.attention_weights import Weighting
from megatron.core.transformer.context_parallel import ring
from megatron.core.transformer.dot_product_attention import DotProductAttention
from tests.helpers.layouts import LayoutResult, run_layout
from tests.parity.test_context_parallel import DENSE as DENSE_OF_CP
from tests.parity.test_context_parallel import make_batch
from tests.parity.test_layouts import compare

SLOW = pytest.mark.slow
DENSE = DENSE_OF_CP | {
    "num_attention_heads": 8,
    "kv_channels": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "position_embedding_type": "rope",
}
CASES: dict[str, dict[str, Any]] = {
    "learnt sinks, every other layer": {
        "window_size": [5, 0],
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
    },
    "capped, off by one": {
        "window_size": [2, 0],
        "softmax_type": "off-by-one",
        "attn_logit_softcapping": 0.7,
        "softmax_scale": 0.6,
    },
    "itself, undropped": {
        "window_size": [0, 0],
        "window_attn_skip_freq": [0, 1],
        "softmax_type": "learnable",
        "attention_dropout": 0.0,
    },
}
SINKS, CAPPED, ITSELF = CASES


def _cp(size: int, kind: str) -> dict[str, Any]:
    return {"context_parallel_size": size, "cp_comm_type": [kind]}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"cp2 {kind}": (2, _cp(2, kind)) for kind in ("p2p", "all_gather", "a2a")},
    **{f"cp4 {kind}": (4, _cp(4, kind)) for kind in ("p2p", "all_gather", "a2a")},
    "tp2 cp2 p2p": (4, _cp(2, "p2p") | {"tensor_model_parallel_size": 2}),
    "tp2 cp2 a2a": (4, _cp(2, "a2a") | {"tensor_model_parallel_size": 2}),
    "tp4 of 2 groups": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "tp2 dp2": (4, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "zero-bubble": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zb-h1"}),
    "zero1": (2, {"use_distributed_optimizer": True}),
    "fsdp": (2, {"use_torch_fsdp2": True}),
    "recomputed on one rank": (1, {"recompute_granularity": "selective"}),
    "recomputed": (2, _cp(2, "p2p") | {"recompute_granularity": "selective"}),
}
QUICK = {
    (SINKS, "cp2 p2p"),
    (SINKS, "cp2 a2a"),
    (SINKS, "tp4 of 2 groups"),
    (SINKS, "recomputed"),
    (CAPPED, "cp2 all_gather"),
    (CAPPED, "cp2 p2p"),
    (ITSELF, "pp2"),
}


@functools.cache
def one_process(case: str) -> LayoutResult:
    """The run that all layouts of ``case`` are compared with."""
    batch_of = functools.partial(make_batch, documents=True)
    return run_layout(1, batch_of=batch_of, **(DENSE | CASES[case]))


def check(case: str, layout: str) -> None:
    """Compare everything that a short run leaves behind."""
    ranks, options = LAYOUTS[layout]
    batch_of = functools.partial(make_batch, documents=True)
    got = run_layout(ranks, batch_of=batch_of, **(DENSE | CASES[case] | options))
    compare(got, one_process(case), weights=True)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=() if (case, layout) in QUICK else SLOW)
        for case in CASES
        for layout in LAYOUTS
    ],
)
def test_layouts_equal_one_process(case: str, layout: str) -> None:
    check(case, layout)


def test_learnt_sinks_learn() -> None:
    result = one_process(SINKS)
    name = "decoder.layers.0.self_attention.core_attention.softmax_offset"
    assert result.initial[name].shape == (8,)
    assert result.initial[name].unique().numel() == 8
    assert (result.steps[0].gradients[name] != 0).all()
    assert (result.steps[-1].weights[name] != result.initial[name]).all()


def _sink_on_every_rank_of_a_sequence(patch: pytest.MonkeyPatch) -> None:
    right = ring._by_head
    patch.setattr(ring, "_by_head", lambda sink, like: right(sink, like) + math.log(2.0))


def _window_of_one_less(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Weighting,
        "first_seen",
        lambda self, position: 0 if self.window is None else max(0, position - self.window + 1),
    )


def _windows_in_the_other_layers(patch: pytest.MonkeyPatch) -> None:
    init = DotProductAttention.__init__

    def wrong(self: Any, config: Any, *, layer_number: int, **rest: Any) -> None:
        init(self, config, layer_number=layer_number, **rest)
        window = config.attention_window_of(layer_number + 1)
        self.weighting = self.weighting._replace(window=window)

    patch.setattr(DotProductAttention, "__init__", wrong)


@pytest.mark.parametrize(
    "bug",
    [_sink_on_every_rank_of_a_sequence, _window_of_one_less, _windows_in_the_other_layers],
    ids=lambda bug: bug.__name__.strip("_"),
)
def test_a_planted_bug_is_seen(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one_process(SINKS)  # before the bug is there
    bug(monkeypatch)
    with pytest.raises(AssertionError, match=r"step 0: (lm_loss|grad_norm)|replicas|disagree"):
        check(SINKS, "cp2 p2p")
