"""Megatron's functions give the same on a CUDA device as on the CPU; skipped without one."""

import pytest
import torch

from megatron.core.transformer.moe import moe_utils

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _results(device: str) -> list[torch.Tensor]:
    """Outputs and gradients of a routing, its losses, and the way there and back."""
    rng = torch.Generator().manual_seed(5)
    logits = torch.randn(50, 8, generator=rng).double().to(device).requires_grad_()
    tokens = torch.randn(50, 16, generator=rng).double().to(device).requires_grad_()
    mask = (torch.arange(50) % 7 == 0).to(device)
    probs, routing_map = moe_utils.topk_routing_with_score_function(logits, 2)
    best, scores = moe_utils.compute_routing_scores_for_aux_loss(
        logits, 2, "sigmoid", padding_mask=mask
    )
    counts, _, total = moe_utils.get_tokens_per_expert_and_token_count(best, None, 2, True)
    loss = moe_utils.switch_load_balancing_loss_func(scores, counts, total, 2, 8, 0.1)
    loss = loss + moe_utils.z_loss_func(logits, 0.1, mask)
    found = moe_utils.permute(tokens, routing_map, probs, num_out_tokens=100)
    sizes = found.tokens_per_expert
    order = torch.arange(7, -1, -1, device=device)
    moved, _ = moe_utils.sort_chunks_by_idxs(found.permuted.square(), sizes, order)
    rows, _ = moe_utils.sort_chunks_by_idxs(moved, sizes[order], order)
    out = moe_utils.unpermute(rows, found.sorted_indices, tokens.shape, probs, routing_map)
    gradients = torch.autograd.grad(out.square().sum() + loss, (tokens, logits))
    padded = moe_utils.pad_routing_map(routing_map, 5)
    return [probs, routing_map, loss, out, *gradients, padded, moe_utils.sinkhorn(logits * 1000)]


def test_results_and_gradients_are_those_of_the_cpu():
    for got, want in zip(_results("cuda"), _results("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), want)


def test_a_tensor_is_moved_to_the_cpu():
    tensor = torch.arange(3.0, device="cuda")
    assert moe_utils.maybe_move_tensor_to_cpu(tensor).device.type == "cpu"
    assert moe_utils.maybe_move_tensor_to_cpu(tensor, as_numpy=True).tolist() == [0.0, 1.0, 2.0]
