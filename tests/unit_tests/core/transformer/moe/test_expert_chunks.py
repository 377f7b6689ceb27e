"""--moe-expert-chunk-tokens: the same results in pieces, and bounded memory under skew."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    count_collectives,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
    relative_error,
)

SIZES = [(13, 6, 21, 9), (0, 5, 0, 12), (0, 0, 0, 0)]
LAYOUTS = [
    (1, 1, 1),
    (2, 2, 1),
    (4, 2, 1),
    pytest.param(4, 4, 1, marks=pytest.mark.slow),
    (2, 1, 2),
    pytest.param(4, 2, 2, marks=pytest.mark.slow),
]
"""Ranks, expert-parallel ranks, ranks that share an expert."""
SHAPES: list[dict[str, Any]] = [
    {"add_bias_linear": True, "moe_shared_expert_intermediate_size": 10},
    {"moe_latent_size": 12, "moe_expert_capacity_factor": 0.75},
    {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True},
    {"moe_experts_type": "sequential"},
    {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
]


def _results(groups: ProcessGroupCollection, num_tokens: int, **options: Any) -> dict[str, Tensor]:
    """Output, gradients and counts of a layer with the weights of the reference."""
    config = moe_config(fp64=True, moe_aux_loss_coeff=[0.3], moe_z_loss_coeff=0.02, **options)
    layer = make_layer(config, groups, make_reference(config))
    metrics = MoEMetricsTracker([1], NUM_EXPERTS, 2, 1, "cpu")
    tokens = make_tokens(num_tokens, torch.float64, dist.get_rank())
    output, _ = layer(tokens.view(num_tokens, 1, H), ForwardContext(moe_metrics=metrics))
    output.square().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    assert all(grad is not None for grad in found.values())
    metrics.end_step()
    report = metrics.report(groups)
    return found | {
        "output": output,
        "input": tokens.grad,
        "tokens per expert": report.tokens_per_expert.double(),
        "dropped": torch.tensor(report.mean("dropped_fraction") or 0.0).nan_to_num(),
    }


def _parity(ep: int, etp: int) -> None:
    groups, rank = make_groups(ep, etp=etp), dist.get_rank()
    for sizes, shape, dispatcher in product(SIZES, SHAPES, TOKEN_DISPATCHERS):
        options = shape | {"moe_token_dispatcher_type": dispatcher}
        want = _results(groups, sizes[rank], **options)
        got = _results(groups, sizes[rank], moe_expert_chunk_tokens=4, **options)
        for name, tensor in want.items():
            assert relative_error(got[name], tensor) <= 1e-12, (name, options, sizes)


@pytest.mark.parametrize(("world_size", "ep", "etp"), LAYOUTS)
def test_chunks_equal_the_whole_in_output_gradients_and_counts(world_size, ep, etp):
    run_ranks(_parity, world_size, ep, etp)


def _collectives(num_tokens: list[int], forward: list, backward: list) -> None:
    config = moe_config(moe_expert_chunk_tokens=4)
    layer = make_layer(config, make_groups(2), make_reference(config))
    tokens = make_tokens(num_tokens[dist.get_rank()], torch.float32)
    with count_collectives() as calls:
        output, _ = layer(tokens.view(-1, 1, H), ForwardContext())
    assert calls == forward
    with count_collectives() as calls:
        output.sum().backward()
    assert calls == backward


AGREED, COUNTS, ROWS, PROBS = ("all_reduce", 0), *(("all_to_all_single", dim) for dim in (1, 2, 1))
BACKWARD = [ROWS, COUNTS, ROWS, PROBS, PROBS, ROWS]
"""Of one chunk: the output's gradient comes, the chunk is sent again, and gradients go back."""


def test_a_chunk_is_sent_again_in_backward_but_not_brought_home_again():
    out, home = [COUNTS, ROWS, PROBS], [ROWS]
    run_ranks(_collectives, 2, [8, 5], [AGREED, *(out + home) * 2], BACKWARD * 2)


def test_all_ranks_make_as_many_chunks_as_the_one_with_most_tokens():
    out, home = [COUNTS, ROWS, PROBS], [ROWS]
    run_ranks(_collectives, 2, [0, 9], [AGREED, *(out + home) * 3], BACKWARD * 3)


def test_one_chunk_is_not_recomputed():
    whole = [AGREED, COUNTS, ROWS, PROBS, ROWS]
    run_ranks(_collectives, 2, [4, 0], whole, [ROWS, PROBS, ROWS])


def _wide_sums() -> None:
    groups = make_groups(1)
    reference = make_reference(moe_config())
    tokens = make_tokens(512, torch.float32).detach().view(-1, 1, H)

    def gradient(name: str, **options: Any) -> Tensor:
        config = moe_config(moe_grouped_mm_backend="torch_native", **options)
        layer = make_layer(config, groups, reference)
        ddp = DistributedDataParallel(DistributedDataParallelConfig(), layer, pg_collection=groups)
        ddp.zero_grad_buffer()
        output, _ = ddp(tokens.to(next(layer.parameters()).dtype), ForwardContext())
        output.float().square().sum().backward()
        ddp.finish_grad_sync()
        found: Tensor = layer.experts.get_parameter(name).main_grad
        return found.clone()

    for name in ("weight1", "weight2"):
        exact = gradient(name)
        errors = [
            ((gradient(name, bf16=True, **options) - exact).norm() / exact.norm()).item()
            for options in ({}, {"moe_expert_chunk_tokens": 2})
        ]
        assert errors[1] < 1.2 * errors[0], (name, errors)


def test_gradients_of_chunks_in_bf16_add_up_in_fp32_in_a_data_parallel_model():
    run_ranks(_wide_sums, 1)


TOKENS, WIDE, FFN = 128, 64, 128


def _peak(groups: ProcessGroupCollection, hot: bool, **options: Any) -> int:
    """Peak bytes of forward and backward of this rank, weights and their gradients left out."""
    config = moe_config(
        hidden_size=WIDE,
        moe_ffn_hidden_size=FFN,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_aux_loss_coeff=[0.01],
        **options,
    )
    layer = make_layer(config, groups, make_reference(config))
    layer.router.weight.data.zero_()
    layer.router.weight.data[:, :NUM_EXPERTS] = 9.0 * torch.eye(NUM_EXPERTS)
    tokens = torch.randn(TOKENS, 1, WIDE) * 0.1
    expert = torch.zeros(TOKENS) if hot else torch.arange(TOKENS) % NUM_EXPERTS
    tokens[torch.arange(TOKENS), 0, expert.long()] = 5.0
    for _ in range(2):  # what libraries keep is there before the second time
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        peak = _run(layer, tokens)
    return peak


def _run(layer: MoELayer, tokens: Tensor) -> int:
    leaf = tokens.clone().requires_grad_()
    with LiveBytes() as memory:
        output, _ = layer(leaf, ForwardContext())
        output.sum().backward()
    return memory.peak


def _skew() -> None:
    groups = make_groups(8)
    balanced = _peak(groups, hot=False)
    skewed = _peak(groups, hot=True)
    chunked = _peak(groups, hot=True, moe_expert_chunk_tokens=TOKENS // 8)
    if dist.get_rank() == 0:
        figures = f"{balanced=} {skewed=} {chunked=}"
        assert skewed > 5 * balanced, f"the case was meant to be skewed: {figures}"
        assert chunked <= 1.2 * balanced, figures


def test_the_hot_rank_of_eight_holds_no_more_than_in_a_balanced_run():
    run_ranks(_skew, 8)
