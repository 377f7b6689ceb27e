"""Experts by a hash of the token id: the same everywhere, distinct, even, weighed by the gate."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.errors import ConfigError
from megatron.core.models.gpt.moe_module_specs import TOKEN_DISPATCHERS
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.hash_routing import (
    hash32,
    hash_map,
    hashed_experts,
    ids_of_tokens,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.routing import combine_weights
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt, world_of_one
from tests.helpers.ranks import run_ranks
from tests.reference.hash_routing import experts_of_token, hash_weights, token_hash
from tests.unit_tests.core.inference.test_generate import PROMPTS, VOCAB, plainly, run
from tests.unit_tests.core.transformer.moe.dense_reference import Z, check_layer
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    make_groups,
    make_layer,
    make_reference,
    make_tokens,
    moe_config,
)

HASH: dict[str, Any] = {"moe_router_type": "hash", "moe_aux_loss_coeff": None}
ODD_IDS = [0, 1, 2, 50256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1, -1, -(2**63)]


@pytest.mark.parametrize("layer", [0, 1, 95])
@pytest.mark.parametrize("slot", [0, 1, 7])
def test_the_hash_is_that_of_whole_numbers(layer, slot):
    got = hash32(torch.tensor(ODD_IDS), layer, slot)
    assert got.tolist() == [token_hash(token, layer, slot) for token in ODD_IDS]
    assert ((got >= 0) & (got < 2**32)).all()


def test_the_hash_never_changes():
    ids = torch.tensor([0, 1, 50256])
    assert hash32(ids, 0, 0).tolist() == [219057650, 602839726, 2022402334]
    assert hashed_experts(ids, 8, 2, 3).tolist() == [[1, 5], [7, 6], [1, 7]]


@pytest.mark.parametrize(("num_experts", "topk"), [(8, 1), (8, 2), (7, 7), (64, 8), (1, 1)])
def test_the_experts_are_those_of_a_loop_and_distinct(num_experts, topk):
    ids = torch.tensor([*ODD_IDS, *range(300)])
    for layer in (0, 5):
        got = hashed_experts(ids, num_experts, topk, layer)
        want = [experts_of_token(token, num_experts, topk, layer) for token in ids.tolist()]
        assert got.tolist() == want
        assert all(len(set(experts)) == topk for experts in want)
        assert (hash_map(ids, num_experts, topk, layer).sum(dim=1) == topk).all()


def test_no_tokens_have_no_experts():
    assert hash_map(torch.zeros(0, dtype=torch.int64), 8, 2, 0).shape == (0, 8)


@pytest.mark.parametrize("num_experts", [8, 60, 64])
def test_every_slot_and_layer_spreads_a_vocabulary_evenly(num_experts):
    ids, topk, size = torch.arange(32_000), 3, 32_000
    expected = size / num_experts
    slots = []
    for layer in range(4):
        chosen = hashed_experts(ids, num_experts, topk, layer)
        for slot in range(topk):
            counts = chosen[:, slot].bincount(minlength=num_experts)
            chi_square = ((counts - expected) ** 2 / expected).sum().item()
            freedom = num_experts - 1
            assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5, (layer, slot)
            slots.append(chosen[:, slot])
    for i, one in enumerate(slots):  # of other layers or slots: agree as if by chance, or never
        for other in slots[:i]:
            assert (one == other).float().mean() < 1 / num_experts + 0.01


def test_a_bit_of_the_id_changes_half_of_the_hash():
    ids = torch.arange(2000)
    plain = hash32(ids, 3, 1)
    for bit in (0, 7, 16, 31, 40):
        changed = hash32(ids ^ (1 << bit), 3, 1) ^ plain
        flips = sum(((changed >> place) & 1).float().mean().item() for place in range(32)) / 32
        assert flips == pytest.approx(0.5, abs=0.02), bit


def test_fewer_slots_are_the_first_of_more():
    ids = torch.arange(500)
    assert torch.equal(hashed_experts(ids, 16, 2, 1), hashed_experts(ids, 16, 6, 1)[:, :2])


@pytest.mark.parametrize(
    ("options", "topk"),
    [({}, 2), ({"pre_softmax": True}, 1), ({"score_function": "sigmoid"}, 1), ({}, 3)],
)
def test_weights_are_the_gates_scores_and_have_their_gradient(options, topk):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(50, (9,), generator=generator)

    routing_map = hash_map(ids, 8, topk, 2)

    def probs(x: torch.Tensor) -> torch.Tensor:
        return combine_weights(x, routing_map, topk, scaling_factor=1.5, **options)

    scores = logits.sigmoid() if "score_function" in options else logits.softmax(dim=1)
    want = scores * routing_map * 1.5
    if not options:
        want = want / (scores * routing_map).sum(dim=1, keepdim=True)
    torch.testing.assert_close(probs(logits), want)
    assert torch.autograd.gradcheck(probs, (logits,))


def _layers(ep: int) -> None:
    groups = make_groups(ep)
    shapes = [((13, 6, 21, 9), 2, False), ((13, 6, 21, 9), 3, True), ((0, 5, 0, 3), 2, True)]
    for (size, topk, fp64), dispatcher in product(shapes, TOKEN_DISPATCHERS):
        config = moe_config(
            **HASH,
            fp64=fp64,
            add_bias_linear=True,
            moe_router_topk=topk,
            moe_token_dispatcher_type=dispatcher,
            moe_z_loss_coeff=Z,
        )
        check_layer(config, groups, size[: dist.get_world_size()], partial(_weights, topk))
    sizes = (5, 8, 3, 2)[: dist.get_world_size()]
    check_layer(config, groups, sizes, partial(_weights, topk), training=False)


def _weights(topk: int, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return hash_weights(logits, ids, topk, layer=1)


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_a_layer_equals_the_reference_on_any_ranks(world_size, ep):
    run_ranks(_layers, world_size, ep)


def _router(**options: Any) -> TopKRouter:
    config = moe_config(**HASH, **options)
    return TopKRouter(config, layer_number=1, pg_collection=world_of_one())


def test_rows_are_position_by_position():
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    tokens = make_tokens(6, torch.float32).view(3, 2, H)
    got = _router()(tokens, ForwardContext(token_ids=ids)).routing_map
    assert torch.equal(got, hash_map(torch.tensor([3, 6, 4, 7, 5, 8]), NUM_EXPERTS, 2, 1))
    assert ids_of_tokens(ids, 6).tolist() == [3, 6, 4, 7, 5, 8]


def test_a_layer_called_by_hand_without_ids_says_what_is_missing():
    tokens = make_tokens(6, torch.float32).view(3, 2, H)
    with pytest.raises(ConfigError, match=r"ForwardContext\(token_ids=input_ids\)"):
        _router()(tokens, ForwardContext())
    with pytest.raises(ConfigError, match="one id for each of the 6 tokens"):
        _router()(tokens, ForwardContext(token_ids=torch.zeros(2, 4, dtype=torch.int64)))


def _capacity() -> None:
    config = moe_config(**HASH, moe_expert_capacity_factor=0.5)
    layer = make_layer(config, make_groups(), make_reference(config))
    kept: list[torch.Tensor] = []
    dispatch = layer.token_dispatcher.token_permutation
    layer.token_dispatcher.token_permutation = lambda x, p, routing_map, **rest: (
        kept.append(routing_map) or dispatch(x, p, routing_map, **rest)
    )
    ids = torch.arange(24)[None]
    layer(make_tokens(24, torch.float32).view(24, 1, H), ForwardContext(token_ids=ids))
    assert int(kept[0].sum(dim=0).max()) == 3
    assert not (kept[0] & ~hash_map(ids[0], NUM_EXPERTS, 2, 1)).any()


def test_a_capacity_drops_hashed_tokens_too():
    run_ranks(_capacity, 1)


def _model(**options: Any) -> Any:
    return tiny_gpt(tiny_config(num_moe_experts=4, **HASH, **options))


@torch.no_grad()
def test_the_model_hands_its_ids_down_and_keeps_nothing():
    model = _model()
    seen = []
    for layer in model.decoder.layers.values():
        layer.mlp.router.register_forward_hook(lambda m, _, out: seen.append((m, out)))
    ids, positions, _ = tiny_batch()
    model(ids, positions)
    assert len(seen) == 2
    for number, (_, routing) in enumerate(seen):
        assert torch.equal(routing.routing_map, hash_map(ids.t().reshape(-1), 4, 2, number))
    assert not torch.equal(seen[0][1].routing_map, seen[1][1].routing_map)


def test_generation_with_a_cache_hashes_the_tokens_it_reads():
    model = _model()
    found = run(model, PROMPTS, eod=VOCAB)
    assert found == [plainly(model, prompt, VOCAB) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in found}) > 1


def test_a_recomputed_layer_routes_the_same_and_every_router_learns():
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recomputed in (False, True):
        model = _model()
        if recomputed:
            for layer in model.decoder.layers.values():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        ids, positions, labels = tiny_batch()
        model(ids, positions, labels=labels).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(layer.mlp.router.weight.grad.any() for layer in model.decoder.layers.values())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
