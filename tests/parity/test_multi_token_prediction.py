"""Multi-token prediction in every layout equals one process: losses and gradients to 1e-12.

Batches have uneven masks and a sample that is wholly masked; dropout is on.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.transformer import tokens_ahead
from megatron.training import mtp_losses
from megatron.training.datasets.batch import Batch
from tests.helpers.layouts import LayoutResult, make_batch, run_layout
from tests.parity.test_layouts import compare as compare_runs

SLOW = pytest.mark.slow
UNTIED = {"untie_embeddings_and_output_weights": True}
DENSE = {"num_moe_experts": None, "moe_aux_loss_coeff": None, "moe_z_loss_coeff": None}
ROPE = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"mtp_num_layers": 1},
    "untied": UNTIED | ROPE | {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.4},
    "dense": DENSE | {"mtp_num_layers": 2},
    "last is MoE": UNTIED | {"mtp_num_layers": 1, "moe_layer_freq": [0, 1]},
    "last is dense": ROPE | {"mtp_num_layers": 1, "moe_layer_freq": [1, 0]},
    "expert bias by layer": {
        "mtp_num_layers": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_num_experts_per_layer": [4, 8],
        "moe_router_topk_per_layer": [1, 3],
    },
    "hash": {"mtp_num_layers": 1, "moe_router_type": "hash", "moe_aux_loss_coeff": None},
    "window of the last": ROPE
    | {"mtp_num_layers": 2, "window_size": [3, 0], "window_attn_skip_freq": [0, 1]},
    "sandwich": UNTIED | ROPE | {"mtp_num_layers": 1, "sandwich_norm": True},
}
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 700}
SHARDED = OVERLAP | {"use_distributed_optimizer": True, "overlap_param_gather": True}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp": (2, SHARDED),
    "tp": (2, TP),
    "sp": (2, SP),
    "cp": (2, CP),
    "pp": (2, PP),
    "ep": (2, EP),
    "norm before the stage of the head": (2, PP | {"pipeline_model_parallel_layout": "Ett|{m}L"}),
    "virtual stages": (2, PP | {"num_virtual_stages_per_pipeline_rank": 2, "num_layers": 4}),
    "zero bubble": (2, PP | OVERLAP | {"pipeline_schedule": "zb-h1"}),
    "dualpipev": (2, PP | {"pipeline_schedule": "dualpipev", "num_layers": 4}),
    "overlapped experts": (2, EP | {"overlap_moe_expert_parallel_comm": True}),
    "overlapped, late weights": (
        2,
        EP | {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True},
    ),
    "zero 3": (2, {"use_torch_fsdp2": True}),
    "recomputed": (2, EP | FULL),
    "zero 3, recomputed": (2, FULL | {"use_torch_fsdp2": True}),
    "sp and pp": (4, SP | PP),
    "sp and ep": (4, SP | EP | {"expert_tensor_parallel_size": 1}),
    "sp and cp": (4, SP | CP),
    "cp and pp": (4, CP | PP),
    "cp and ep": (4, CP | EP),
    "ep and pp, sharded": (4, EP | PP | SHARDED),
}
QUICK = [
    ("untied", "pp"),
    ("tied", "cp"),
    ("expert bias by layer", "sp and ep"),
    ("untied", "zero 3"),
]
NO_EXPERTS = {"ep", "overlapped experts", "recomputed", "sp and ep", "cp and ep"}
NO_EXPERTS |= {"ep and pp, sharded", "overlapped, late weights"}
BY_LAYER = {"moe_layer_freq", "moe_num_experts_per_layer", "window_attn_skip_freq"}
FOUR_LAYERS = {"virtual stages", "dualpipev"}


def wide() -> list[Any]:
    """Every model in every layout that can be, but for the quick ones."""
    found = []
    for model in MODELS:
        for layout in LAYOUTS:
            by_layer = BY_LAYER & MODELS[model].keys()
            if model == "dense" and layout in NO_EXPERTS:
                continue
            if by_layer and layout in FOUR_LAYERS:
                continue
            if (model, layout) not in QUICK:
                found.append(pytest.param(model, layout, marks=SLOW))
    return found


def run(model: str, world_size: int, layout: dict[str, Any]) -> LayoutResult:
    options = {"optimizer": "sgd"} | MODELS[model] | layout
    text = options.get("pipeline_model_parallel_layout")
    if text is not None:
        depths = "m" * MODELS[model]["mtp_num_layers"]
        options["pipeline_model_parallel_layout"] = text.replace("{m}", depths)
    return run_layout(world_size, **options)


@functools.cache
def one_process(model: str, num_layers: int) -> LayoutResult:
    """The run that all layouts of ``model`` are compared with."""
    return run(model, 1, {"num_layers": num_layers})


def compare(got: LayoutResult, want: LayoutResult) -> None:
    """Compare all that layouts are compared by, and the loss of each depth."""
    compare_runs(got, want, weights=True)
    ahead = [name for name in want.metrics if name.endswith("_loss") and "/mtp_" in name]
    assert len(ahead) >= 2
    for name in ahead:
        assert got.metrics[name] == pytest.approx(want.metrics[name], rel=1e-12), name


@pytest.mark.parametrize(("model", "layout"), [*QUICK, *wide()])
def test_layout_equals_one_process(model: str, layout: str) -> None:
    world_size, options = LAYOUTS[layout]
    got = run(model, world_size, options)
    compare(got, one_process(model, options.get("num_layers", 2)))


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_every_part_of_every_depth_learns_and_is_measured(model: str) -> None:
    result, depths = one_process(model, 2), MODELS[model]["mtp_num_layers"]
    for step in result.steps:
        for key, gradient in step.gradients.items():
            assert gradient.abs().max() > 0 or ".local_experts." in key, f"{key} has no gradient"
    # steps x samples x tokens x top-k, of each MoE layer and each depth
    assert result.tokens_per_expert.sum(dim=1).tolist() == [2 * 8 * 12 * 2] * (2 + depths)
    assert {name.split("/")[0] for name in result.metrics} >= {"2", "1", f"{1 + depths}"}


def test_the_factor_scales_what_the_depths_add_to_the_gradient() -> None:
    options = {"moe_aux_loss_coeff": [0.0], "moe_z_loss_coeff": None, "optimizer": "sgd"}

    def gradients(factor: float) -> dict[str, torch.Tensor]:
        more = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": factor}
        return run_layout(1, steps=1, **options, **more).steps[0].gradients

    nothing, once, twice = (gradients(factor) for factor in (0.0, 0.2, 0.4))
    for key in once:
        ahead = once[key] - nothing[key]
        torch.testing.assert_close(twice[key] - nothing[key], 2 * ahead, rtol=1e-10, atol=1e-14)
        if key.startswith("mtp."):
            assert nothing[key].abs().max() == 0


def documents(sample_ids: range) -> Batch:
    """Samples of several documents, which positions and attention tell apart."""
    whole = make_batch(sample_ids)
    length = whole.tokens.shape[1]
    borders = torch.tensor([[3 + n % 3, 8] for n in sample_ids])
    places = torch.arange(length)
    document = (places >= borders[:, :1]).long() + (places >= borders[:, 1:]).long()
    first = torch.stack(
        [(document[b][:, None] == document[b]).int().argmax(1) for b in range(len(document))]
    )
    closed = document[:, :, None] != document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    return replace(whole, position_ids=places - first, attention_mask=(causal | closed)[:, None])


@pytest.mark.parametrize("layout", ["cp", pytest.param("cp and pp", marks=SLOW)])
def test_documents_end_alike_in_every_layout(layout: str) -> None:
    options = {"optimizer": "sgd", "batch_of": documents} | MODELS["tied"]
    world_size, sizes = LAYOUTS[layout]
    want = run_layout(1, **options)
    compare(run_layout(world_size, **(options | sizes)), want)
    assert want.metrics["step 0/mtp_1_loss"] != one_process("tied", 2).metrics["step 0/mtp_1_loss"]


def _mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = tokens_ahead._shifted

    def wrong(x: torch.Tensor, step: int, *, beyond: int = 0) -> torch.Tensor:
        return right(x, step - x.is_floating_point(), beyond=beyond) if step > 1 else right(x, step)

    patch.setattr(tokens_ahead, "_shifted", wrong)


def _slices_before_looking(patch: pytest.MonkeyPatch) -> None:
    right = mtp_losses.look_ahead

    def wrong(tokens: torch.Tensor, *rest: Any, depths: int) -> tokens_ahead.Ahead:
        ids, mask = right(tokens, *rest, depths=depths)
        ids[:, 2] = 0  # as if what follows were another rank's
        return tokens_ahead.Ahead(ids, mask)

    patch.setattr(mtp_losses, "look_ahead", wrong)


def _ends_not_summed(patch: pytest.MonkeyPatch) -> None:
    right = DistributedDataParallel._group
    patch.setattr(
        DistributedDataParallel,
        "_group",
        lambda self, key: right(self, key._replace(tied_ends="no")),
    )


@pytest.mark.parametrize(
    ("plant", "layout"),
    [
        (_mask_off_by_one, "cp"),
        (_slices_before_looking, "cp"),
        (_ends_not_summed, "pp"),
    ],
)
def test_a_planted_bug_is_seen(plant: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = one_process("untied", 2)
    plant(monkeypatch)
    world_size, options = LAYOUTS[layout]
    with pytest.raises(AssertionError):
        compare(run("untied", world_size, options), want)
