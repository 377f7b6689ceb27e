"""Megatron's losses and counts against plain loops; padding masks; sums over ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.transformer.moe import load_balancing
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    compute_routing_scores_for_aux_loss,
    get_default_pg_collection,
    get_moe_layer_wise_logging_tracker,
    get_tokens_per_expert_and_token_count,
    get_updated_expert_bias,
    maybe_move_tensor_to_cpu,
    reduce_aux_losses_tracker_across_ranks,
    save_to_aux_losses_tracker,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    track_moe_metrics,
    z_loss_func,
)
from tests.helpers.ranks import run_ranks
from tests.reference import megatron_functions as plain
from tests.reference.moe import ReferenceRule, full_scores, reference_routing

SCORES = ["softmax", "sigmoid", "sqrtsoftplus"]
PADDING = [False, True, False, False, True, False, False, False, False]


def _logits(num_tokens: int = 9, seed: int = 3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 5, generator=rng).double().requires_grad_()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_equals_a_loop_over_tokens_and_experts(score, padded):
    logits = _logits()
    mask = torch.tensor(PADDING) if padded else None
    routing_map, scores = compute_routing_scores_for_aux_loss(
        logits, 2, score, fused=True, padding_mask=mask
    )
    padding = PADDING if padded else [False] * 9
    rule = ReferenceRule(2, score)
    _, chosen = reference_routing(logits, rule)
    for token, pad in enumerate(padding):
        experts = [] if pad else sorted(chosen[token].tolist())
        assert routing_map[token].nonzero().flatten().tolist() == experts
        torch.testing.assert_close(scores[token], full_scores(logits, rule)[token] * (not pad))
    counts, own, total = get_tokens_per_expert_and_token_count(
        routing_map, None, topk=2, with_padding_mask=padded
    )
    assert own == total == 9 - sum(padding)
    got = switch_load_balancing_loss_func(scores, counts, total, 2, 5, 0.3, True, mask)
    want = plain.balance_loss(
        full_scores(logits, rule), counts.tolist(), int(total), 2, 0.3, padding
    )
    torch.testing.assert_close(got, want)
    gradient, expected = (torch.autograd.grad(loss, logits)[0] for loss in (got, want))
    torch.testing.assert_close(gradient, expected)
    assert not gradient[torch.tensor(padding)].any()


def test_scores_of_padding_do_not_count_although_they_are_there():
    logits, mask = _logits(), torch.tensor(PADDING)
    counts = torch.tensor([4, 2, 0, 5, 3])
    got = switch_load_balancing_loss_func(logits.softmax(dim=1), counts, 7, 2, 5, 0.3, False, mask)
    want = plain.balance_loss(logits.softmax(dim=1), counts.tolist(), 7, 2, 0.3, PADDING)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


def test_the_balance_loss_is_that_of_our_router():
    logits = _logits()
    routing_map, scores = compute_routing_scores_for_aux_loss(logits, 2, "softmax")
    counts = routing_map.sum(dim=0)
    got = switch_load_balancing_loss_func(scores, counts, 9, 2, 5, 1.0)
    want = load_balancing.switch_load_balancing_loss(logits, counts, 2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


@pytest.mark.parametrize("padding", [[False] * 9, PADDING, [True] * 9])
def test_the_z_loss_is_the_mean_over_tokens_that_are_no_padding(padding):
    logits = _logits()
    mask = torch.tensor(padding)
    want = plain.z_loss(logits, 0.7, padding)
    for shaped, shaped_mask in ((logits, mask), (logits.view(3, 3, 5), mask.view(3, 3))):
        got = z_loss_func(shaped, 0.7, shaped_mask)
        torch.testing.assert_close(got, want)
        expected = torch.autograd.grad(want, logits, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(got, logits), expected)
    if not any(padding):
        torch.testing.assert_close(z_loss_func(logits, 0.7), want)
    assert torch.autograd.gradcheck(lambda x: z_loss_func(x, 0.7, mask), logits)


def test_garbage_in_padding_reaches_no_loss_and_no_gradient():
    logits = _logits().detach().float()
    clean = logits.clone()
    logits[1], logits[4] = float("nan"), float("inf")
    mask = torch.tensor(PADDING)
    found = []
    for values in (logits, clean):
        leaf = values.clone().requires_grad_()
        routing_map, scores = compute_routing_scores_for_aux_loss(leaf, 2, "softmax", False, mask)
        counts = routing_map.sum(dim=0)
        loss = switch_load_balancing_loss_func(scores, counts, 7, 2, 5, 0.3, padding_mask=mask)
        total = loss + z_loss_func(leaf, 0.7, mask)
        found.append((total, torch.autograd.grad(total, leaf)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_losses_of_no_tokens_are_zero():
    logits = torch.zeros(0, 5, requires_grad=True)
    _, scores = compute_routing_scores_for_aux_loss(logits, 2, "sigmoid")
    zeros = torch.zeros(5, dtype=torch.int64)
    loss = switch_load_balancing_loss_func(scores, zeros, 0, 2, 5, 0.3)
    loss = loss + switch_load_balancing_loss_func(scores, zeros, torch.tensor(0), 2, 5, 0.3)
    loss = loss + z_loss_func(logits, 0.1) + z_loss_func(logits, 0.1, torch.zeros(0).bool())
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


def test_a_loss_in_the_two_argument_form_enters_backward_with_the_scale_set_last():
    output, source = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    attached = MoEAuxLossAutoScaler.apply(output, source * 10.0)
    own = MoEAuxLossAutoScaler.apply(attached, source * 10.0, 0.125)
    assert torch.equal(own, output)
    try:
        for scale in (torch.tensor(0.25), 0.5):
            MoEAuxLossAutoScaler.set_loss_scale(scale)
            output.grad = source.grad = None
            (own.sum() * 1000.0).backward(retain_graph=True)
            assert source.grad is not None
            assert source.grad.item() == pytest.approx(10.0 * (float(scale) + 0.125))
            assert torch.equal(output.grad, torch.full((3,), 1000.0))
    finally:
        MoEAuxLossAutoScaler.set_loss_scale(1.0)


def test_an_expert_bias_does_not_see_padding():
    logits = _logits()
    mask = torch.tensor(PADDING)
    _, routing_map = topk_routing_with_score_function(
        logits, 2, score_function="sigmoid", expert_bias=torch.zeros(5)
    )
    real = routing_map & ~mask[:, None]  # [T, E] & [T] is a shape error in Megatron
    counts, own, total = get_tokens_per_expert_and_token_count(real, None, 2, True)
    want = [sum(bool(routing_map[t, e]) and not PADDING[t] for t in range(9)) for e in range(5)]
    assert counts.tolist() == want
    assert own.item() == total.item() == 7
    got = get_updated_expert_bias(counts.float(), torch.ones(5), 0.5)
    mean = sum(want) / 5
    assert got.tolist() == [1.0 + 0.5 * ((c < mean) - (c > mean)) for c in want]


def _on_ranks(ep: int) -> None:
    groups = parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
    world, rank = dist.get_world_size(), dist.get_rank()
    every = [_logits(seed=other).detach().requires_grad_() for other in range(world)]
    maps, scores = zip(
        *(compute_routing_scores_for_aux_loss(x, 2, "softmax") for x in every), strict=True
    )
    counts, own, total = get_tokens_per_expert_and_token_count(maps[rank], groups.dp_cp)
    assert (own, total) == (9, 9 * world)
    assert torch.equal(counts, sum(m.sum(dim=0) for m in maps))
    loss = switch_load_balancing_loss_func(scores[rank], counts, total, 2, 5, 0.3)
    (got,) = torch.autograd.grad(loss, every[rank])
    whole = torch.cat(every)
    both = plain.balance_loss(whole.softmax(dim=1), counts.tolist(), total, 2, 0.3, [False] * total)
    torch.testing.assert_close(got, torch.autograd.grad(both, every)[rank])
    dist.all_reduce(loss := loss.detach())
    torch.testing.assert_close(loss, both.detach())

    assert get_default_pg_collection() is groups
    mine = maps[rank].sum(dim=0).float()
    by_default = get_updated_expert_bias(mine, torch.zeros(5), 0.1)
    by_group = get_updated_expert_bias(mine, torch.zeros(5), 0.1, groups.dp_cp)
    want = [0.1 * ((c < total * 2 / 5) - (c > total * 2 / 5)) for c in counts.tolist()]
    assert by_default.tolist() == by_group.tolist() == pytest.approx(want)

    save_to_aux_losses_tracker("aux", torch.tensor(rank + 1.0), 1, 2)
    save_to_aux_losses_tracker("aux", torch.tensor(3.0), 2, 2)
    reduce_aux_losses_tracker_across_ranks()
    values = get_moe_layer_wise_logging_tracker()["aux"].values
    assert values.tolist() == [(world + 1) / 2, 3.0]
    save_to_aux_losses_tracker("sum", torch.tensor(2.0), 1, 1, groups.dp_cp, None, True)
    reduce_aux_losses_tracker_across_ranks(["sum"])
    assert get_moe_layer_wise_logging_tracker()["sum"].values.item() == 2.0 * world


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_counts_losses_biases_and_old_trackers_sum_over_ranks(world_size, ep):
    run_ranks(_on_ranks, world_size, ep)


class _Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, Any] = {}

    def add_scalar(self, name: str, value: torch.Tensor, iteration: int) -> None:
        self.scalars[name] = (round(value.item(), 6), iteration)

    def log(self, scalars: dict[str, torch.Tensor], iteration: int) -> None:
        for name, value in scalars.items():
            self.add_scalar(name, value, iteration)


@pytest.mark.parametrize(("freq", "layers"), [(None, 4), (2, 2), ([0, 1, 1, 1], 3)])
def test_the_old_tracker_reports_means_over_moe_layers_and_begins_anew(freq, layers):
    get_moe_layer_wise_logging_tracker().clear()
    for _ in range(2):  # microbatches
        for layer in (1, 3):
            save_to_aux_losses_tracker("aux", torch.tensor(float(layer)), layer, 4)
        save_to_aux_losses_tracker("aux", torch.tensor(9.0), None, 4)
    writer, wandb, totals = _Writer(), _Writer(), {"aux": torch.tensor(1.0)}
    track_moe_metrics(
        0.5, 7, writer, wandb, totals, per_layer_logging=True, num_layers=4, moe_layer_freq=freq
    )
    assert writer.scalars == wandb.scalars
    assert writer.scalars["aux"] == (round(4.0 / layers, 6), 7)
    assert [writer.scalars[f"moe/aux_layer_{i}"][0] for i in range(4)] == [1.0, 0.0, 3.0, 0.0]
    assert totals["aux"].item() == pytest.approx(1.0 + 4.0 / layers)
    assert not get_moe_layer_wise_logging_tracker()["aux"].values.any()
    track_moe_metrics(1.0, 8, writer, force_initialize=True, track_names=["new"], num_layers=3)
    assert writer.scalars["new"] == (0.0, 8)
    clear_aux_losses_tracker()
    get_moe_layer_wise_logging_tracker().clear()


def test_what_is_on_the_cpu_already_stays_as_it_is():
    tensor = torch.arange(3.0)
    assert maybe_move_tensor_to_cpu(tensor) is tensor
    assert maybe_move_tensor_to_cpu([1, 2]) == [1, 2]
    assert maybe_move_tensor_to_cpu(None) is None
    array = maybe_move_tensor_to_cpu(tensor.requires_grad_(), as_numpy=True)
    assert type(array).__name__ == "ndarray"
    assert array.tolist() == [0.0, 1.0, 2.0]
