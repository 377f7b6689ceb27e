"""Sends and receives pair up in one order; no list waits for ever, whether sends block or not."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import example, given, settings

from megatron.core.pipeline_parallel.schedule_plan import build_schedule, one_f_one_b
from megatron.core.pipeline_parallel.schedule_simulator import simulate
from megatron.core.pipeline_parallel.schedule_step import Product, Step, forward_only
from megatron.core.pipeline_parallel.schedule_transfers import Transfer, with_transfers
from tests.unit_tests.core.pipeline_parallel.test_schedule_plan import LARGEST, plans


def channels(lists):
    """Return for each pair (sender, receiver) what is sent and what is received, in order."""
    sent, received = defaultdict(list), defaultdict(list)
    for rank, actions in enumerate(lists):
        for action in actions:
            if isinstance(action, Transfer) and action.direction == "send":
                sent[rank, action.peer].append(action.product)
            elif isinstance(action, Transfer):
                received[action.peer, rank].append(action.product)
    return sent, received


@given(plan=plans())
@example(plan={"name": "interleaved", **LARGEST, "vpp": 4})
@example(plan={"name": "interleaved", **LARGEST, "vpp": 4, "group_size": 23})
@example(plan={"name": "dualpipev", **LARGEST})
@example(plan={"name": "zb-h2", **LARGEST})
@settings(deadline=None, max_examples=25)
def test_lists_with_transfers_run_to_the_end_with_buffered_and_with_blocking_sends(plan):
    schedule = build_schedule(**plan)
    lists = with_transfers(schedule)
    sent, received = channels(lists)
    assert sent == received
    for own, actions in zip(schedule.steps, lists, strict=True):
        assert own == tuple(action for action in actions if isinstance(action, Step))
    for sends in ("buffered", "blocking"):
        timeline = simulate(schedule, sends=sends, actions=lists)
        assert timeline.deadlock is None, str(timeline.deadlock)
        assert [len(runs) for runs in timeline.runs] == [len(own) for own in schedule.steps]


def test_every_product_crosses_once_and_before_it_is_needed():
    schedule = build_schedule("dualpipev", pp=3, num_microbatches=7)
    sent, _ = channels(with_transfers(schedule))
    products = [product for channel in sent.values() for product in channel]
    # Activations leave all stages but the last, gradients all but the first; at the turn of the V
    # both sides are on one rank.
    assert len(products) == len(set(products)) == 7 * 2 * (6 - 1 - 1)
    for rank, actions in enumerate(with_transfers(schedule)):
        here = set()
        for action in actions:
            if isinstance(action, Transfer):
                assert action.direction == "recv" or action.product in here
                here.add(action.product)
            else:
                assert set(schedule.needs(rank, action)) <= here
                here.add(schedule.makes(rank, action))


def test_neighbours_in_one_order_is_what_saves_blocking_sends():
    """1F1B with each send where its step ends and each receive where it is needed does deadlock."""
    schedule = one_f_one_b(2, 4)
    naive = []
    for rank, own in enumerate(schedule.steps):
        actions = []
        for step in own:
            for product in schedule.needs(rank, step):
                home = schedule.home(product.stage).rank
                if home != rank:
                    actions.append(Transfer("recv", home, product))
            actions.append(step)
            receiver = schedule.receiver(schedule.makes(rank, step))
            if receiver is not None:
                actions.append(Transfer("send", receiver, schedule.makes(rank, step)))
        naive.append(actions)
    assert simulate(schedule, actions=naive).deadlock is None
    deadlock = simulate(schedule, actions=naive, sends="blocking").deadlock
    assert [wait.rank for wait in deadlock.waits] == [0, 1]
    assert "rank 0 stands at action 3, send activation of microbatch 1, stage 0, to rank 1" in str(
        deadlock
    )
    assert "rank 1 stands at action 3, send gradient of microbatch 0, stage 1, to rank 0" in str(
        deadlock
    )


def test_one_rank_and_evaluation_need_no_or_only_forward_messages():
    assert not any(
        channels(with_transfers(build_schedule("1f1b", pp=1, num_microbatches=3, vpp=2)))
    )
    schedule = forward_only(build_schedule("interleaved", pp=3, num_microbatches=4, vpp=2))
    sent, _ = channels(with_transfers(schedule))
    kinds = {product.kind for channel in sent.values() for product in channel}
    assert kinds == {"activation"}
    assert simulate(schedule, sends="blocking").deadlock is None


def test_steps_that_cannot_be_ordered_are_refused_with_where_ranks_stand():
    schedule = one_f_one_b(2, 2)
    broken = replace(schedule, steps=(schedule.steps[0][::-1], schedule.steps[1]))
    with pytest.raises(AssertionError, match=r"0: 'B1.0', 1: 'F0.0'"):
        with_transfers(broken)


def test_actions_are_written_for_people():
    product = Product("gradient", 3, 1)
    assert str(Transfer("recv", 2, product)) == (
        "recv gradient of microbatch 3, stage 1, from rank 2"
    )
    assert str(Step("W", 3, 1)) == "W3.1"
