"""Real model code in which one rank does something else: the dry run finds it and says where."""

from typing import Any

import pytest
import torch

from megatron.core.optimizer import optimizer as optimizer_module
from megatron.core.pipeline_parallel import executor as executor_module
from megatron.core.tensor_parallel.mappings import all_gather_rows, all_to_all, exchange_counts
from megatron.core.transformer.moe import router as router_module
from megatron.core.transformer.moe.microbatch_share import MicrobatchShare
from megatron.core.transformer.moe.permutation import (
    permute,
    permute_probs,
    plan_rows,
    rank_major_to_expert_major,
    reorder,
)
from megatron.core.transformer.moe.token_dispatcher.alltoall import (
    AllToAllState,
    MoEAlltoAllTokenDispatcher,
)
from megatron.core.transformer.moe.token_dispatcher.base import DispatchedTokens, rows_sent
from megatron.training.dry_run.census import take_census
from megatron.training.dry_run.command import dry_run
from megatron.training.dry_run.matcher import Problem, describe
from megatron.training.dry_run.plan import Closeness, rehearse
from megatron.training.dry_run.recorded_run import Recipe
from pretrain_gpt import forward_step, model_provider
from tests.helpers.layouts import make_config

EP = {"num_layers": 1, "expert_model_parallel_size": 2, "global_batch_size": 4}
TP = {"num_layers": 1, "tensor_model_parallel_size": 2, "global_batch_size": 4}
CLOSE = Closeness(every_rank=True, every_pass=True, every_layer=True)


def _problem(
    world_size: int, closeness: Closeness = CLOSE, device: str = "cpu", **options: Any
) -> Problem | None:
    config = make_config(**options)
    recipe = Recipe(
        config=config,
        layout=config.model.layout(world_size),
        model_provider=model_provider,
        forward_step=forward_step,
        device=device,
    )
    table = recipe.groups()
    census = take_census(config, model_provider, table)
    return rehearse(recipe, table, census, closeness).problem


SOUND: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "dp": (2, {}),
    "ep": (2, {"expert_model_parallel_size": 2}),
    "tp and sp": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dedup": (
        2,
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall_dedup"},
    ),
    "allgather": (
        2,
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
    ),
    "two hops": (
        4,
        {
            "expert_model_parallel_size": 4,
            "moe_token_dispatcher_type": "alltoall_hierarchical",
            "moe_dispatcher_node_size": 2,
        },
    ),
    "slices of experts": (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "ring": (2, {"context_parallel_size": 2}),
    "gathered keys": (2, {"context_parallel_size": 2, "cp_comm_type": ["all_gather"]}),
    "swapped heads": (2, {"context_parallel_size": 2, "cp_comm_type": ["a2a"]}),
    "sharded optimizer": (2, {"use_distributed_optimizer": True}),
    "overlapped": (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "pipeline": (2, {"pipeline_model_parallel_size": 2, "num_layers": 2}),
    "interleaved, tied": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "num_virtual_stages_per_pipeline_rank": 2,
            "num_layers": 4,
            "expert_model_parallel_size": 2,
            "overlap_grad_reduce": True,
        },
    ),
    "zero bubble": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zb-h1"}),
    "v shape": (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev", "num_layers": 4},
    ),
    "lanes": (2, {"expert_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True}),
    "capacity": (2, {"expert_model_parallel_size": 2, "moe_expert_capacity_factor": 1.0}),
    "hash": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "moe_router_type": "hash",
            "moe_router_load_balancing_type": ["none"],
            "moe_aux_loss_coeff": [],
            "moe_z_loss_coeff": None,
        },
    ),
}
QUICK = ("ep", "overlapped")


@pytest.mark.parametrize("name", QUICK)
def test_a_legal_layout_has_no_deadlock(name: str) -> None:
    world_size, options = SOUND[name]
    assert _problem(world_size, num_layers=1, global_batch_size=4, **options) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "cpu") for name in SOUND if name not in QUICK]
    + [(name, "cuda") for name in SOUND if "pipeline_model_parallel_size" in SOUND[name][1]],
)
def test_other_legal_layouts_have_none_either(name: str, device: str) -> None:
    world_size, options = SOUND[name]
    assert _problem(world_size, device=device, **options) is None


_permutation = MoEAlltoAllTokenDispatcher.token_permutation


def _probs_before_rows(
    self: Any, hidden_states: Any, probs: Any, routing_map: Any, **_: Any
) -> Any:
    """Do ``token_permutation``, but place 1 sends the probs first."""
    if self.ep_group.rank() != 1:
        return _permutation(self, hidden_states, probs, routing_map)
    received, splits, sizes = exchange_counts(
        self.ep_group, self.expt_tp_group, routing_map.sum(dim=0)
    )
    num_rows = rows_sent(splits.send, hidden_states.shape[0], self.topk, exact=self.exact)
    plan = plan_rows(routing_map, num_rows=num_rows, max_rows_per_token=self.topk)
    weights = all_to_all(self.ep_group, permute_probs(probs, plan), splits)
    rows = all_to_all(self.ep_group, permute(hidden_states, plan), splits)
    rows = all_gather_rows(self.expt_tp_group, rows, sizes)
    order = rank_major_to_expert_major(received, rows.shape[0])
    return DispatchedTokens(
        hidden_states=reorder(rows, order),
        probs=reorder(weights, order),
        tokens_per_expert=received.sum(dim=(0, 1)),
        state=AllToAllState(plan=plan, splits=splits, sizes=sizes, order=order),
    )


@pytest.mark.parametrize("closeness", [CLOSE, Closeness(True, False, False)])
def test_two_collectives_of_a_layer_swapped_on_one_rank(
    monkeypatch: pytest.MonkeyPatch, closeness: Closeness
) -> None:
    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "token_permutation", _probs_before_rows)
    problem = _problem(2, closeness, **EP)
    assert problem is not None
    text = "\n".join(describe(problem))
    assert "rank 0: all_to_all" in text
    assert "rank 1: all_to_all" in text
    assert "test_planted_deadlocks.py" in text
    assert "token_dispatcher/alltoall.py" in text


def test_two_groups_swapped_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = optimizer_module.owned_gradients

    def swapped(gradients: Any, groups: Any) -> Any:
        found = plain(gradients, groups)
        return found[::-1] if groups.world.rank() == 1 else found

    monkeypatch.setattr(optimizer_module, "owned_gradients", swapped)
    # tp_ep has 4 ranks and tp 2: rank 1 asks tp first
    problem = _problem(4, **(TP | EP | {"expert_tensor_parallel_size": 2}))
    assert problem is not None
    assert problem.kind == "standstill"
    text = "\n".join(describe(problem))
    assert "tp_ep" in text
    assert "clip_grads.py" in text
    assert {0, 1} <= {standing.rank for standing in problem.standings}


def test_a_collective_that_one_rank_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MicrobatchShare.total

    def skipped(share: Any, x: Any) -> Any:
        return x if share.group.rank() == 1 else plain(share, x)

    monkeypatch.setattr(MicrobatchShare, "total", skipped)
    problem = _problem(2, **TP)
    assert problem is not None
    assert "microbatch_share.py" in "\n".join(describe(problem))


def test_a_message_that_one_stage_does_not_send(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = executor_module._Walk._send

    def skipped(walk: Any, transfer: Any) -> None:
        if transfer.product.kind == "gradient" and transfer.product.microbatch == 0:
            walk.there.pop(transfer.product)
            return
        plain(walk, transfer)

    monkeypatch.setattr(executor_module._Walk, "_send", skipped)
    problem = _problem(2, num_layers=2, pipeline_model_parallel_size=2, global_batch_size=4)
    assert problem is not None
    text = "\n".join(describe(problem))
    assert "rank 0: recv" in text
    assert "executor.py" in text
    assert "rank 1" in text


def test_messages_that_two_ranks_begin_in_different_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = executor_module.with_transfers

    def sends_first(schedule: Any) -> Any:
        """Let each rank begin what it sends as soon as it is made, and ask for others' later."""
        lists = []
        for actions in map(list, plain(schedule)):
            for place, action in enumerate(actions[1:], 1):
                before = actions[place - 1]
                if getattr(action, "direction", "") == "send" and hasattr(before, "direction"):
                    actions[place - 1 : place + 1] = [action, before]
            lists.append(tuple(actions))
        return tuple(lists)

    monkeypatch.setattr(executor_module, "with_transfers", sends_first)
    options = {"num_layers": 2, "pipeline_model_parallel_size": 2, "global_batch_size": 8}
    assert _problem(2, **options) is None
    problem = _problem(2, device="cuda", **options)
    assert problem is not None
    assert "executor.py" in "\n".join(describe(problem))


def test_another_size_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = router_module.all_reduce_sum

    def longer(group: Any, x: Any) -> Any:
        if group.rank() == 1:
            return plain(group, torch.cat([x, x]))[: len(x)]
        return plain(group, x)

    monkeypatch.setattr(router_module, "all_reduce_sum", longer)
    problem = _problem(
        2, num_layers=1, global_batch_size=4, moe_router_load_balancing_type=["global_aux_loss"]
    )
    assert problem is not None
    assert problem.kind == "different"
    sizes = {s.rank: s.post.elements for s in problem.standings if s.post is not None}
    assert sizes == {0: 8, 1: 16}


def test_a_deadlock_is_told_and_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "token_permutation", _probs_before_rows)
    config = make_config(**EP, dry_run=True, dry_run_world_size=2)
    assert dry_run(config, model_provider, forward_step) == 1
    assert "DEADLOCK: an all-to-all sends other sizes" in capsys.readouterr().out
