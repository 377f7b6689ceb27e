"""Ranks that walk the lists over gloo get the gradients of one process: a small executor."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.pipeline_parallel.schedule_plan import build_schedule
from megatron.core.pipeline_parallel.schedule_step import Product, Step
from megatron.core.pipeline_parallel.schedule_transfers import with_transfers
from tests.helpers.ranks import run_ranks

WIDTH, ROWS = 5, 3


def weight(stage):
    generator = torch.Generator().manual_seed(stage)
    values = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def batch(microbatch):
    generator = torch.Generator().manual_seed(1000 + microbatch)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def gradients_of_one_process(num_stages, num_microbatches):
    weights = [weight(stage) for stage in range(num_stages)]
    for microbatch in range(num_microbatches):
        x = batch(microbatch)
        for w in weights:
            x = torch.tanh(x @ w)
        x.square().sum().backward()
    return [w.grad for w in weights]


class Walker:
    """Carries out the list of one rank; stage s is tanh(x W_s), the loss a sum of squares."""

    def __init__(self, schedule, blocking):
        self.schedule, self.blocking, self.rank = schedule, blocking, dist.get_rank()
        stages = [schedule.stage(self.rank, chunk) for chunk in range(schedule.chunks)]
        self.weights = {stage: weight(stage) for stage in stages}
        self.grads = {stage: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for stage in stages}
        self.tensors, self.started, self.sent, self.graphs = {}, {}, [], {}

    def walk(self):
        for action in with_transfers(self.schedule)[self.rank]:
            if isinstance(action, Step):
                self.step(action)
            elif action.direction == "send":
                tensor = self.tensors[action.product]
                if self.blocking:
                    dist.send(tensor, action.peer)
                else:
                    self.sent.append((dist.isend(tensor, action.peer), tensor))
            else:
                buffer = torch.empty(ROWS, WIDTH, dtype=torch.float64)
                self.tensors[action.product] = buffer
                if self.blocking:
                    dist.recv(buffer, action.peer)
                else:
                    self.started[action.product] = dist.irecv(buffer, action.peer)
        for work, _ in self.sent:
            work.wait()
        assert not self.started, "a message was received and not needed"
        return self.grads

    def take(self, product):
        if product in self.started:
            self.started.pop(product).wait()
        return self.tensors[product]

    def step(self, step):
        stage = self.schedule.stage(self.rank, step.chunk)
        key, w = (step.microbatch, stage), self.weights[stage]
        made = self.schedule.makes(self.rank, step)
        if step.kind == "F":
            before = Product("activation", step.microbatch, stage - 1)
            x = (self.take(before) if stage else batch(step.microbatch)).clone().requires_grad_()
            y = torch.tanh(x @ w)
            self.graphs[key] = (x, y)
            self.tensors[made] = y.detach()
            return
        x, y = self.graphs[key]
        last = stage == self.schedule.num_stages - 1
        after = Product("gradient", step.microbatch, stage + 1)
        grad = 2 * y.detach() if last else self.take(after)
        if step.kind != "W":
            (self.tensors[made],) = torch.autograd.grad(y, x, grad, retain_graph=True)
        if step.kind != "I":
            self.grads[stage] += torch.autograd.grad(y, w, grad)[0]
            del self.graphs[key]


def walk_and_compare(plan):
    schedule = build_schedule(**plan)
    expected = gradients_of_one_process(schedule.num_stages, schedule.num_microbatches)
    for blocking in (True, False):
        for stage, grad in Walker(schedule, blocking).walk().items():
            torch.testing.assert_close(grad, expected[stage], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "pp", "num_microbatches", "vpp"),
    [
        ("1f1b", 1, 3, 2),
        ("1f1b", 2, 5, None),
        ("1f1b", 4, 3, None),
        ("interleaved", 2, 5, 3),
        ("interleaved", 4, 6, 2),
        ("zb-h1", 4, 6, None),
        ("zb-h2", 4, 9, None),
        ("dualpipev", 2, 6, None),
        ("dualpipev", 4, 3, None),
        ("dualpipev", 4, 10, None),
    ],
)
def test_ranks_that_walk_the_lists_get_the_gradients_of_one_process(
    name, pp, num_microbatches, vpp
):
    plan = {"name": name, "pp": pp, "num_microbatches": num_microbatches, "vpp": vpp}
    run_ranks(walk_and_compare, pp, plan)
