"""--overlap-moe-expert-parallel-comm: what happens when, and how a pair of microbatches fails."""

import os
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch import nn

from megatron.core.transformer.moe.experts import GroupedMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.weight_grad_queue import WeightGradQueue
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.late_rows import late_rows
from tests.helpers.layouts import make_config, make_run, microbatches
from tests.helpers.ranks import run_ranks

OPTIONS: dict[str, Any] = {
    "num_layers": 1,
    "expert_model_parallel_size": 2,
    "global_batch_size": 8,  # two microbatches on each of two ranks
    "optimizer": "sgd",
}
OVERLAP = {"overlap_moe_expert_parallel_comm": True}


def _lane() -> str:
    return "B" if threading.current_thread().name == "lane" else "F"


def _noting(events: list[str]) -> Callable[[str], None]:
    return lambda word: events.append(f"{_lane()} {word}")


def _note(module: nn.Module, name: str, events: list[str]) -> None:
    """Note when ``module`` is computed, and differentiated."""

    def noted(_: nn.Module, __: object, output: Any) -> None:
        events.append(f"{_lane()} {name}")
        output[0].register_hook(lambda _: events.append(f"{_lane()} {name} back"))

    module.register_forward_hook(noted)


def _noted_run(events: list[str], **options: Any) -> Run:
    run = make_run(make_config(**(OPTIONS | options)))
    for module in run.model.modules():
        if isinstance(module, GroupedMLP):
            _note(module, "experts", events)
        if isinstance(module, TransformerLayer):
            _note(module.self_attention, "attention", events)
    return run


def _step(run: Run) -> float:
    return train_step(run, TrainState(dropout_seed=1), microbatches(run, 0)).lm_loss


PAIR = [
    "B launch",  # behind loss and head: the gradient of the way back
    "F attention",
    *["F launch"] * 2,  # rows and their probs
    "B wait",
    "B experts back",
    *["B launch"] * 2,
    *["F wait"] * 2,
    "F experts",
    "F launch",
    *["B wait"] * 2,
    "B attention back",
    "F wait",  # then its loss
]
FORWARD = [line for line in PAIR if line.startswith("F")]
BACKWARD = [line.replace("B ", "F ") for line in PAIR if line.startswith("B")]


def _order() -> None:
    events: list[str] = []
    run = _noted_run(events, **OVERLAP)
    with late_rows(_noting(events)):
        loss = _step(run)
    assert events == FORWARD + PAIR + BACKWARD
    events.clear()
    plain = _noted_run(events)
    with late_rows(_noting(events)):
        assert _step(plain) == loss
    assert not [event for event in events if "launch" in event or event.startswith("B")]


def test_one_microbatch_computes_between_launch_and_landing_of_the_other():
    run_ranks(_order, 2)


def _late_weights() -> None:
    """The order is the same, and behind every launch of a backward come its weight gradients."""
    events: list[str] = []
    run = _noted_run(events, **OVERLAP, delay_wgrad_compute=True)
    plain = _noted_run([])
    run_so_far = WeightGradQueue.run_so_far

    def noted(queue: WeightGradQueue) -> None:
        events.append(f"{_lane()} {len(queue)} weights")
        run_so_far(queue)

    with patch.object(WeightGradQueue, "run_so_far", noted), late_rows(_noting(events)):
        loss = _step(run)
    kinds = [event for event in events if not event.endswith("weights")]
    assert kinds == FORWARD + PAIR + BACKWARD
    made = {at: int(e.split()[1]) for at, e in enumerate(events) if e.endswith("weights")}
    assert len(made) == 4  # two ways of the rows of two microbatches
    for at in made:
        assert events[at - 1] == f"{events[at][0]} launch"
    behind_loss, behind_experts = list(made.values())[:2]
    assert behind_loss >= 1  # the output layer's
    assert behind_experts >= 1  # those of the experts: both matrices are one entry
    assert _step(plain) == loss


def test_weight_gradients_are_made_between_launch_and_landing():
    run_ranks(_late_weights, 2)


def _computed_under_each(events: list[str]) -> list[list[str]]:
    """Return for each batch of launches what the other lane did before they were waited for."""
    found = []
    for at, event in enumerate(events):
        lane = event[0]
        if event == f"{lane} launch" and events[at - 1] != event:
            wait = events.index(f"{lane} wait", at)
            found.append([e for e in events[at:wait] if e[0] != lane and e[2] in "ae"])
    return found


def _deep() -> None:
    events: list[str] = []
    run = _noted_run(events, num_layers=3, **OVERLAP)
    with late_rows(_noting(events)):
        _step(run)
    of_backward = [at for at, event in enumerate(events) if event[0] == "B"]
    end = events.index("F wait", of_backward[-1]) + 1
    under = _computed_under_each(events[of_backward[0] : end])
    assert len(under) == 12  # out and back, of rows and of gradients, in three layers
    assert all(under), under


def test_every_way_of_the_rows_has_attention_or_experts_of_the_other_lane_under_it():
    run_ranks(_deep, 2)


class PlantedError(Exception):
    """Of the test."""


def _plant(run: Run, where: str) -> None:
    """Fail in the pair, in the middle of the forward or of the backward."""
    experts = next(m for m in run.model.modules() if isinstance(m, GroupedMLP))
    calls = []

    def fail(*_: object) -> None:
        raise PlantedError(where)

    def planted(_: nn.Module, __: object, output: Any) -> None:
        calls.append(None)
        if where == "forward" and len(calls) == 2:
            fail()
        if where == "backward" and len(calls) == 1:
            output[0].register_hook(fail)

    experts.register_forward_hook(planted)


def _fails(where: str) -> None:
    before = threading.active_count()
    run = make_run(make_config(**(OPTIONS | OVERLAP | {"num_layers": 2})))
    if dist.get_rank() == 1:
        _plant(run, where)
        with pytest.raises(PlantedError, match=where) as caught:
            _step(run)
        names = [entry.name for entry in caught.traceback]
        assert {"fail", "run_pair"} <= set(names)
    else:  # until the other rank is gone
        with pytest.raises(RuntimeError, match=r"(?i)closed by peer|reset|broken pipe"):
            _step(run)
    assert threading.active_count() == before
    os._exit(0)  # no barrier with a rank that is gone


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_of_one_rank_ends_both_lanes_of_all_ranks(where):
    run_ranks(_fails, 2, where)
