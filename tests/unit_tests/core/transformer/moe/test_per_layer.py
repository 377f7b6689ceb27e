"""MoE layers with their own numbers of experts and top-k: config, modules, metrics, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.dist_checkpointing.serialization import read_tensors, write_tensors
from megatron.core.errors import ConfigError
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.router_updates import update_expert_biases
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import parse_args
from megatron.training.setup_model import build_moe_metrics
from megatron.training.throughput import flops_per_token
from megatron.training.wrap_up import _span
from tests.helpers.models import MAX_LENGTH, VOCAB, tiny_batch, tiny_config, tiny_gpt
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import make_groups

EXPERTS, TOPK = [0, 4, 8, 6], [0, 1, 3, 2]
PATTERNS: dict[str, Any] = {
    "num_layers": 4,
    "moe_layer_freq": [0, 1, 1, 1],
    "num_moe_experts": 8,
    "moe_num_experts_per_layer": EXPERTS,
    "moe_router_topk_per_layer": TOPK,
    "moe_router_pre_softmax": True,
}
SIGMOID = {"moe_router_pre_softmax": False, "moe_router_score_function": "sigmoid"}
LINE = "--num-layers 4 --hidden-size 64 --mock-data --moe-router-pre-softmax"


def _config(**options: Any) -> TransformerConfig:
    return tiny_config(**(PATTERNS | options))


def test_a_layer_is_built_from_plain_numbers():
    config = _config()
    config.check()
    for layer in (1, 2, 3):
        own = config.for_layer(layer)
        own.check()
        assert (own.num_moe_experts, own.moe_router_topk) == (EXPERTS[layer], TOPK[layer])
        assert own.for_layer(layer) is own
    assert config.moe_layers == (1, 2, 3)
    assert config.moe_experts_by_layer == (4, 8, 6)
    assert config.moe_topk_by_layer == (1, 3, 2)
    with pytest.raises(AssertionError, match="is a dense layer"):
        config.for_layer(0)
    alike = tiny_config(num_moe_experts=4)
    assert alike.for_layer(1) is alike


def test_one_pattern_leaves_the_other_number_as_it_is():
    only_experts = _config(moe_router_topk_per_layer=None)
    assert only_experts.moe_topk_by_layer == (2, 2, 2)
    only_topk = _config(moe_num_experts_per_layer=None)
    assert only_topk.moe_experts_by_layer == (8, 8, 8)


BAD = {
    "short": ({"moe_router_topk_per_layer": [1, 2]}, "has 2 entries, one for each of"),
    "dense": (
        {"moe_num_experts_per_layer": [4, 4, 8, 8]},
        "holds 4 for layer 0, which --moe-layer-freq makes dense: write 0",
    ),
    "none": ({"moe_router_topk_per_layer": [0, 1, 0, 2]}, "holds 0 for layer 2, which is a MoE"),
    "largest": ({"num_moe_experts": 16}, "--num-experts 16 must be the largest entry of"),
    "missing": ({"num_moe_experts": None}, "needs --num-experts, its largest entry"),
    "topk": (
        {"moe_router_topk_per_layer": [0, 5, 5, 5]},
        "--moe-router-topk 5 must lie between 1 and --num-experts 4 (in layer 1)",
    ),
    "groups": (
        {
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 1,
            "moe_router_topk_per_layer": [0, 1, 1, 1],
        },
        "--moe-router-num-groups 4 must divide --num-experts 6 (in layer 3)",
    ),
    "gradient": (
        {"moe_router_pre_softmax": False},
        "--moe-router-topk 1 needs --moe-router-pre-softmax",
    ),
    "everywhere": (
        {"moe_shared_expert_gate": True},
        "or leave it out (in all MoE layers)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_fits_no_layer_is_named_with_the_layer(name):
    options, message = BAD[name]
    with pytest.raises(ConfigError) as error:
        _config(**options).check()
    assert message in str(error.value)
    assert str(error.value).count("\n  - ") == 1


def test_the_command_line_reads_patterns_and_derives_the_largest():
    line = (
        f"{LINE} --moe-num-experts-per-layer ([8]*2+[16]*2) --moe-router-topk-per-layer "
        "([2]*3+[1]*1) --expert-model-parallel-size 4"
    )
    config = parse_args(line.split(), world_size=4)
    model = config.model
    assert model.moe_experts_by_layer == (8, 8, 16, 16)
    assert model.moe_topk_by_layer == (2, 2, 2, 1)
    assert (model.num_moe_experts, model.moe_router_topk) == (16, 2)
    assert any("--num-experts 16 (the largest entry" in notice for notice in config.notices)


def test_modules_have_their_own_sizes_and_learn():
    model = tiny_gpt(_config())
    for layer in (1, 2, 3):
        mlp = model.decoder.layers[str(layer)].mlp
        assert mlp.router.weight.shape[0] == EXPERTS[layer]
        assert mlp.router.topk == TOPK[layer]
        assert mlp.experts.weight1.shape[0] == EXPERTS[layer]
        assert mlp.token_dispatcher.num_experts == EXPERTS[layer]
        assert mlp.token_dispatcher.topk == TOPK[layer]
    ids, positions, labels = tiny_batch()
    model(ids, positions, labels=labels).sum().backward()
    for layer in (1, 2, 3):
        assert model.decoder.layers[str(layer)].mlp.router.weight.grad.any()


def test_work_is_counted_layer_by_layer():
    def flops(**options: Any) -> float:
        return flops_per_token(_config(**options), seq_length=4, vocab_size=32)

    alike = {"moe_router_topk_per_layer": None, "moe_num_experts_per_layer": None}
    per_expert = 6 * 2 * 32 * 128  # two matrices of h x 4 h
    assert flops() - flops(**alike, moe_router_topk=1) == per_expert * (0 + 2 + 1)
    assert _span((4, 8, 6)) == "4 to 8"
    assert _span((2, 2)) == "2"


def _tracked(model: GPTModel, tracker: MoEMetricsTracker, microbatches: int) -> None:
    for microbatch in range(microbatches):
        ids, positions, labels = tiny_batch(seed=microbatch)
        context = ForwardContext(moe_metrics=tracker, microbatch=microbatch)
        model(ids, positions, labels=labels, context=context).sum().backward()


def _metrics() -> None:
    groups = make_groups()
    config = _config(**SIGMOID, moe_router_enable_expert_bias=True)
    model = tiny_gpt(config, pg_collection=groups)
    tracker = MoEMetricsTracker(
        config.moe_layers, config.moe_experts_by_layer, config.moe_topk_by_layer, 2, "cpu"
    )
    _tracked(model, tracker, 2)
    update_expert_biases(model, tracker, groups.dp_cp)
    tracker.end_step()
    report = tracker.report(groups)
    assert [use.num_experts for use in report.layers] == [4, 8, 6]
    tokens = 2 * 2 * 11
    for row, use in enumerate(report.layers):
        layer, own = use.layer, use.tokens_per_expert
        assert (len(own), use.topk) == (EXPERTS[layer], TOPK[layer])
        assert int(own.sum()) == tokens * TOPK[layer]
        mean = tokens * TOPK[layer] / EXPERTS[layer]
        assert use.max_violation == pytest.approx(own.max().item() / mean - 1)
        assert use.min_violation == pytest.approx(own.min().item() / mean - 1)
        assert use.dead_experts == own.tolist().count(0)
        assert f"[{' '.join(map(str, own.tolist()))}]" in report.lines()[row]
        bias = model.decoder.layers[str(layer)].mlp.router.expert_bias
        assert torch.equal(bias, 1e-3 * (mean - own.double()).sign().float())
    assert int(report.tokens_per_expert[0, 4:].sum()) == 0


def test_metrics_and_biases_are_over_the_experts_that_a_layer_has():
    run_ranks(_metrics, 1)


def test_a_dead_expert_is_told_of_the_layers_own_number():
    tracker = MoEMetricsTracker([1, 2], [2, 4], 1, 1, "cpu")
    for layer, counts in ((1, [3, 5]), (2, [4, 4, 0, 0])):
        tracker.record(
            layer,
            0,
            tokens_per_expert=torch.tensor(counts),
            load_balancing_loss=None,
            z_loss=None,
            entropy=torch.tensor(0.5),
        )
    tracker.end_step()
    run_ranks(_dead, 1, tracker)


def _dead(tracker: MoEMetricsTracker) -> None:
    (warning,) = tracker.report(make_groups()).warnings()
    assert warning.startswith("experts without tokens in MoE layers 2 (2 of 4);")


def _ep_load() -> None:
    tracker = MoEMetricsTracker([0, 1], [2, 4], 1, 1, "cpu")
    for layer, counts in ((0, [3, 5]), (1, [4, 4, 0, 8])):
        tracker.record(
            layer,
            0,
            tokens_per_expert=torch.tensor(counts),
            load_balancing_loss=None,
            z_loss=None,
            entropy=torch.tensor(0.5),
        )
    tracker.end_step()
    assert tracker.report(make_groups(2)).ep_load_ratio == pytest.approx(1.25)  # 5 of (3 + 5) / 2


def test_the_load_of_a_rank_is_that_of_its_share_of_each_layer():
    run_ranks(_ep_load, 2)


def _global_balance() -> None:
    config = _config(
        **SIGMOID, moe_router_load_balancing_type=["global_aux_loss"], moe_aux_loss_coeff=[0.1]
    )
    model = tiny_gpt(config, pg_collection=make_groups())
    tracker = MoEMetricsTracker(
        config.moe_layers, config.moe_experts_by_layer, config.moe_topk_by_layer, 2, "cpu"
    )
    _tracked(model, tracker, 2)
    tracker.end_step()
    assert tracker.report(make_groups()).losses()["global_load_balancing_loss"] >= 0.9


def test_balance_over_the_batch_keeps_counts_of_each_size():
    run_ranks(_global_balance, 1)


def test_a_run_makes_its_metrics_from_the_patterns():
    class OnCpu:
        device = "cpu"

    config = parse_args(
        f"{LINE} --moe-num-experts-per-layer [2,4,8,2] --moe-router-topk 1".split(), world_size=1
    )
    tracker: Any = build_moe_metrics(config, OnCpu(), 3)  # type: ignore[arg-type]
    assert tracker.num_experts == (2, 4, 8, 2)
    assert tracker._counts.shape == (4, 3, 8)


def _model() -> GPTModel:
    options = {"moe_num_experts_per_layer": [0, 4, 8, 4], "moe_router_topk_per_layer": [0, 1, 3, 2]}
    config = _config(**options, expert_model_parallel_size=dist.get_world_size())
    groups = ProcessGroupCollection.create(config.layout(dist.get_world_size()))
    spec = get_gpt_decoder_block_spec(config)
    return GPTModel(config, spec, VOCAB, MAX_LENGTH, pg_collection=groups)


def _save(folder: str) -> None:
    model = _model()
    init_weights(model, 7)
    write_tensors(Path(folder), model_tensors(model), dist.group.WORLD)


def _load(folder: str) -> None:
    expected, model = _model(), _model()
    init_weights(expected, 7)
    init_weights(model, 8)
    read_tensors(Path(folder), model_tensors(model), dist.group.WORLD, prefixes=("model.",))
    for key, tensor in model_tensors(expected).items():
        assert torch.equal(model_tensors(model)[key], tensor), key


def test_a_checkpoint_of_unequal_layers_fits_every_number_of_ranks(tmp_path):
    run_ranks(_save, 2, str(tmp_path))
    for world in (1, 4):
        run_ranks(_load, world, str(tmp_path))
