"""Router replay: the recorded experts again, with the weights of the model at hand; no leaks."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.core.errors import ConfigError, DataError
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import (
    RouterReplay,
    RouterReplayAction,
    indices_of_map,
    map_of_indices,
    replay_for_layers,
)
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt, world_of_one
from tests.helpers.ranks import run_ranks
from tests.reference.moe import raw_scores
from tests.unit_tests.core.transformer.moe.layers import (
    NUM_EXPERTS,
    H,
    logical_gradients,
    make_groups,
    make_layer,
    make_reference,
    make_rule,
    make_tokens,
    moe_config,
    relative_error,
)

RECORD, FORWARD, BACKWARD = RouterReplayAction


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    RouterReplay.clear_global_router_replay_instances()
    yield
    RouterReplay.clear_global_router_replay_instances()


def _router(seed: int, **options: Any) -> TopKRouter:
    options = {"fp64": True, "moe_enable_routing_replay": True} | options
    router = TopKRouter(moe_config(**options), layer_number=1, pg_collection=world_of_one())
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(NUM_EXPERTS, H, generator=rng) * 0.3)
    return router


RULES: list[dict[str, Any]] = [
    {},
    {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    {"moe_router_topk": 3, "moe_router_score_function": "sigmoid"},
    {"moe_router_score_function": "sqrtsoftplus", "moe_router_topk_scaling_factor": 2.5},
    {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
    {"moe_router_load_balancing_type": ["sinkhorn"], "moe_aux_loss_coeff": None},
    {"moe_router_load_balancing_type": ["quantile_balancing"], "moe_aux_loss_coeff": None},
]


@pytest.mark.parametrize("options", RULES, ids=lambda o: "-".join(map(str, o.values())) or "plain")
def test_another_model_takes_the_recorded_experts_and_its_own_weights(options):
    first, second = _router(1, **options), _router(2, **options)
    tokens = make_tokens(40, torch.float64)
    RouterReplay.set_global_router_replay_action(RECORD, first)
    recorded = first(tokens, ForwardContext())
    (indices,) = RouterReplay.get_recorded_data(first)
    assert torch.equal(map_of_indices(indices, NUM_EXPERTS), recorded.routing_map)
    RouterReplay.clear_global_router_replay_action(first)

    own = second(tokens, ForwardContext())
    assert not torch.equal(own.routing_map, recorded.routing_map)
    RouterReplay.set_replay_data([indices], second)
    RouterReplay.set_global_router_replay_action(FORWARD, second)
    probs, routing_map = second(tokens, ForwardContext())
    assert torch.equal(routing_map, recorded.routing_map)

    config = moe_config(**options)
    logits = tokens @ second.weight.t()
    rule = make_rule(config)
    if config.moe_router_choice == "sinkhorn":
        rule = rule._replace(pre_softmax=True)
    weights = raw_scores(logits, rule).gather(1, indices)
    if not rule.pre_softmax:
        weights = weights / weights.sum(dim=1, keepdim=True) * rule.scaling_factor
    want = torch.zeros_like(logits).scatter(1, indices, weights)
    torch.testing.assert_close(probs, want, rtol=1e-12, atol=1e-12)
    weight = torch.arange(float(NUM_EXPERTS), dtype=torch.float64)
    got = torch.autograd.grad((probs * weight).sum(), second.weight)
    expected = torch.autograd.grad((want * weight).sum(), second.weight)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)

    RouterReplay.clear_global_router_replay_action(second)
    assert torch.equal(second(tokens, ForwardContext()).routing_map, own.routing_map)


def test_microbatches_in_flight_keep_their_own_indices_in_any_order_of_backwards():
    router = _router(1)
    batches = [make_tokens(size, torch.float64, size) for size in (6, 9, 4)]
    contexts = [ForwardContext(microbatch=i) for i in range(3)]
    router.router_replay.set_router_replay_action(RECORD)
    first = [router(x, context) for x, context in zip(batches, contexts, strict=True)]
    assert router.router_replay.recorded.keys() == {0, 1, 2}
    with torch.no_grad():
        router.weight.mul_(-1.0)
    router.router_replay.set_router_replay_action(BACKWARD)
    for i in (2, 0, 1):
        assert torch.equal(router(batches[i], contexts[i]).routing_map, first[i].routing_map)
    with pytest.raises(DataError, match="microbatch 3: no forward of this microbatch"):
        router(batches[0], ForwardContext(microbatch=3))
    targets = indices_of_map(first[1].routing_map, 2)
    router.router_replay.clear_indices()
    router.router_replay.set_router_replay_action(FORWARD)
    router.router_replay.set_target_indices(targets, microbatch=1)
    router.router_replay.set_target_indices(targets[:4])
    assert torch.equal(router(batches[1], contexts[1]).routing_map, first[1].routing_map)
    got = router(batches[2], contexts[2]).routing_map
    assert torch.equal(got, first[1].routing_map[:4])


@pytest.mark.parametrize("action", [FORWARD, BACKWARD])
def test_a_recomputed_forward_takes_what_the_forward_took(action):
    """Also with another action set between them, as Megatron-LM's scripts do."""
    router, tokens = _router(1), make_tokens(30, torch.float64)
    replay = router.router_replay
    replay.set_target_indices(torch.arange(60).view(30, 2) % NUM_EXPERTS)
    weight = torch.arange(float(NUM_EXPERTS), dtype=torch.float64)

    def gradient(recompute: bool) -> Tensor:
        replay.set_router_replay_action(FORWARD)
        if recompute:
            probs = checkpoint(
                lambda x: router(x, ForwardContext()).probs, tokens, use_reentrant=False
            )
        else:
            probs = router(tokens, ForwardContext()).probs
        replay.set_router_replay_action(action)
        if action is BACKWARD:
            replay._targets.clear()
        (grad,) = torch.autograd.grad((probs * weight).sum(), router.weight)
        return grad

    recomputed = gradient(recompute=True)
    replay.set_target_indices(torch.arange(60).view(30, 2) % NUM_EXPERTS)
    assert torch.equal(recomputed, gradient(recompute=False))
    replay.clear_router_replay_action()
    own = router(tokens, ForwardContext()).probs
    (other,) = torch.autograd.grad((own * weight).sum(), router.weight)
    assert not torch.allclose(recomputed, other)


BAD = {
    "too few rows": (torch.zeros(3, 1).long() + torch.arange(2), "3 rows of indices to replay"),
    "another topk": (torch.arange(12).view(4, 3) % 8, r"are \[4, 3\]; they must be \[num_tokens"),
    "no matrix": (torch.arange(4), r"are \[4\]; they must be"),
    "floats": (torch.zeros(4, 2), "torch.float32; they must be of an integer type"),
    "a mask": (torch.zeros(4, 2).bool(), "torch.bool; they must be of an integer type"),
    "expert 8 of 8": (torch.tensor([[0, 8]] * 4), "name experts 0 to 8; there are 0 to 7"),
    "expert -1": (torch.tensor([[-1, 3]] * 4), "name experts -1 to 3"),
    "one twice": (torch.tensor([[0, 1], [2, 3], [5, 5], [1, 0]]), "twice for one token.*row 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_indices_that_do_not_fit_are_refused(name):
    indices, message = BAD[name]
    router = _router(1)
    router.router_replay.set_router_replay_action(FORWARD)

    def replay() -> None:
        RouterReplay.set_replay_data([indices])
        router(make_tokens(4, torch.float64), ForwardContext())

    with pytest.raises(DataError, match=message):
        replay()


def test_replaying_nothing_is_refused():
    router = _router(1)
    router.router_replay.set_router_replay_action(FORWARD)
    with pytest.raises(DataError, match="microbatch 0: call set_target_indices"):
        router(make_tokens(4, torch.float64), ForwardContext())
    with pytest.raises(DataError, match="is of 2 layers, and 1 routers"):
        RouterReplay.set_replay_data([torch.zeros(1, 2).long()] * 2)
    with pytest.raises(ValueError, match="replay"):
        RouterReplay.set_global_router_replay_action("replay")


def test_without_the_flag_there_is_no_replay_and_the_static_calls_say_so():
    router = _router(1, moe_enable_routing_replay=False)
    assert router.router_replay is None
    for call in (
        lambda: RouterReplay.set_global_router_replay_action(RECORD),
        lambda: RouterReplay.get_recorded_data(router),
        lambda: RouterReplay.set_replay_data([], router),
        RouterReplay.clear_global_indices,
    ):
        with pytest.raises(ConfigError, match="build the model with --moe-enable-routing-replay"):
            call()


def test_a_model_that_is_gone_leaves_nothing():
    kept, gone = _router(1), _router(2)
    assert RouterReplay.instances() == [kept.router_replay, gone.router_replay]
    RouterReplay.set_global_router_replay_action(RECORD, gone)
    assert kept.router_replay.action is None
    del gone
    gc.collect()
    assert RouterReplay.instances() == [kept.router_replay]
    kept(make_tokens(3, torch.float64), ForwardContext())
    assert RouterReplay.get_recorded_data() == [None]


def test_recorded_indices_land_in_the_static_buffer():
    routers = [_router(1), _router(2)]
    buffer = torch.full((10, 2, 2), -1)
    RouterReplay.set_global_static_buffers(buffer)
    RouterReplay.set_global_router_replay_action(RECORD)
    for router in routers:
        router(make_tokens(7, torch.float64), ForwardContext())
    for layer, data in enumerate(RouterReplay.get_recorded_data()):
        assert torch.equal(buffer[:7, layer], data)
        assert data.data_ptr() == buffer[:, layer].data_ptr()
    assert (buffer[7:] == -1).all()
    assert not torch.equal(buffer[:7, 0], buffer[:7, 1])
    with pytest.raises(DataError, match="10 rows for 11 tokens"):
        routers[0](make_tokens(11, torch.float64), ForwardContext())
    RouterReplay.clear_global_static_buffers()
    routers[0](make_tokens(11, torch.float64), ForwardContext())
    with pytest.raises(DataError, match="layers 2, topk 2"):
        RouterReplay.set_global_static_buffers(buffer[:, :1])


def test_a_router_of_ones_own_asks_get_replay_topk():
    replay, scores = RouterReplay(4, 2), torch.tensor([[1.0, 4.0, 3.0, 2.0]])

    def compute(scores, topk, num_groups=None, group_topk=None):
        assert (num_groups, group_topk) == (2, 1)
        return scores.topk(topk)

    replay.action = RECORD
    values, indices = replay.get_replay_topk(scores, 2, 2, 1, compute)
    assert indices.tolist() == [[1, 2]]
    replay.action = BACKWARD
    values, indices = replay.get_replay_topk(-scores, 2)
    assert values.tolist() == [[-4.0, -3.0]]
    assert indices.tolist() == [[1, 2]]


def _hidden(model: GPTModel, context: ForwardContext) -> Tensor:
    ids, positions, labels = tiny_batch()
    return model(ids, positions, None, labels=labels, context=context)


def test_a_context_replays_a_whole_model_without_the_flag():
    config = tiny_config(num_moe_experts=4, num_layers=3, moe_layer_freq=[1, 0, 1])
    first, second = tiny_gpt(config, seed=1), tiny_gpt(config, seed=2)
    replays = replay_for_layers(config)
    assert sorted(replays) == [0, 2]
    for replay in replays.values():
        replay.action = RECORD
    context = ForwardContext(router_replay=replays)
    _hidden(first, context)
    data = [replay.get_recorded_indices() for replay in replays.values()]
    assert all(x.shape == (22, 2) for x in data)

    own = _hidden(second, ForwardContext())
    for replay in replays.values():
        replay.set_target_indices(replay.get_recorded_indices())
        replay.action = FORWARD
    replayed = _hidden(second, context)
    assert not torch.equal(own, replayed)
    routers = [m for m in second.modules() if isinstance(m, TopKRouter)]
    seen = []
    for router in routers:
        router.register_forward_hook(lambda module, args, routing: seen.append(routing.routing_map))
    assert torch.equal(_hidden(second, context), replayed)
    for routing_map, indices in zip(seen, data, strict=True):
        assert torch.equal(routing_map, map_of_indices(indices, 4))
    assert torch.equal(_hidden(second, ForwardContext()), own), "nothing stays on the model"


def test_replays_of_layers_that_differ_have_the_sizes_of_their_layers():
    config = moe_config(moe_num_experts_per_layer=[4, 8], moe_router_topk_per_layer=[1, 2])
    replays = replay_for_layers(config)
    assert {n: (r.num_experts, r.topk) for n, r in replays.items()} == {0: (4, 1), 1: (8, 2)}
    replays[0].set_target_indices(torch.tensor([[3]]))
    with pytest.raises(DataError, match="0 to 3"):
        replays[0].set_target_indices(torch.tensor([[4]]))


def _layer(groups: Any, scale: float, **options: Any) -> tuple[MoELayer, Any]:
    config = moe_config(fp64=True, **options)
    reference = make_reference(config)
    with torch.no_grad():
        reference.gate.weight.mul_(scale)
    return make_layer(config, groups, reference), reference


def _round_trip(ep: int) -> None:
    groups, rank = make_groups(ep), dist.get_rank()
    sizes = (13, 6, 21, 9)[: dist.get_world_size()]
    tokens = make_tokens(sizes[rank], torch.float64, rank)
    recorder, source = _layer(groups, 1.0, moe_enable_routing_replay=True)
    RouterReplay.set_global_router_replay_action(RECORD, recorder)
    recorder(tokens.view(-1, 1, H), ForwardContext())
    (indices,) = RouterReplay.get_recorded_data(recorder)

    layer, reference = _layer(groups, -1.0, moe_enable_routing_replay=True)
    RouterReplay.set_replay_data([indices], layer)
    RouterReplay.set_global_router_replay_action(FORWARD, layer)
    output, _ = layer(tokens.view(-1, 1, H), ForwardContext())
    output.square().sum().backward()

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = source.gate(inputs).topk(2).indices
        return logits.gather(1, chosen).softmax(dim=1), chosen

    reference.route = route
    for other, size in enumerate(sizes):
        inputs = make_tokens(size, torch.float64, other)
        want = reference(inputs).output
        want.square().sum().backward()
        if other == rank:
            assert relative_error(output.view(-1, H), want) <= 1e-12
            assert relative_error(tokens.grad, inputs.grad) <= 1e-12
    expected = reference.logical(gradients=True)
    for name, gradient in logical_gradients(layer, groups).items():
        assert relative_error(gradient, expected[name]) <= 1e-12, name


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_each_rank_replays_its_tokens_in_every_layout(world_size, ep):
    run_ranks(_round_trip, world_size, ep)


def test_recording_waits_for_no_device():
    """A meta tensor has no values: whoever looks at one raises."""
    routing_map = torch.empty(5, 4, dtype=torch.bool, device="meta")
    indices = indices_of_map(routing_map, 2)
    assert indices.shape == (5, 2)
    assert map_of_indices(indices, 4).shape == (5, 4)
