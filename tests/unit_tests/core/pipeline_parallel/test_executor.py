"""The executor over gloo: gradients of one process, what is in no_sync, what is freed when."""

import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from megatron.core.grad_sink import offer_grad_sink
from megatron.core.pipeline_parallel.executor import Message, PipelineExecutor
from megatron.core.pipeline_parallel.schedule_plan import build_schedule
from megatron.core.weight_grad_queue import WeightGradQueue, weight_gradient
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.pipeline_parallel.test_lists_on_ranks import (
    ROWS,
    WIDTH,
    batch,
    gradients_of_one_process,
    weight,
)

PLANS = [
    ("1f1b", 1, 3, None),
    ("1f1b", 2, 5, None),
    ("1f1b", 4, 2, None),
    ("interleaved", 2, 5, 3),
    ("zb-h1", 4, 6, None),
    ("zb-h2", 2, 5, None),
    ("dualpipev", 2, 6, None),
    ("dualpipev", 4, 3, None),
]


class Sink:
    """Sums gradients, and knows what is put off."""

    def __init__(self):
        self.sum, self.waits = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0

    def __call__(self):
        return self.sum

    def put_off(self):
        self.waits += 1

    def settle(self):
        self.waits -= 1


class Product(torch.autograd.Function):
    """x W, whose weight gradient goes to a sink."""

    @staticmethod
    def forward(ctx, x, w, sink):
        ctx.save_for_backward(x, w)
        ctx.sink = sink
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.t(), weight_gradient(ctx.sink, lambda g, rows: rows.t() @ g, grad, x), None


class Stages:
    """The stages of a rank, stage s being tanh(x W_s); the loss is a sum of squares."""

    def __init__(self, schedule, rank):
        self.schedule = schedule
        self.stages = [schedule.stage(rank, chunk) for chunk in range(schedule.chunks)]
        self.weights = {stage: weight(stage) for stage in self.stages}
        self.sinks = {stage: Sink() for stage in self.stages}
        for stage in self.stages:
            offer_grad_sink(self.weights[stage], self.sinks[stage])
        self.outputs, self.syncs, self.unsynced = [], 0, 0

    def forward(self, microbatch, chunk, pipeline_input):
        stage = self.stages[chunk]
        x = batch(microbatch) if pipeline_input is None else pipeline_input
        assert (stage == 0) == (pipeline_input is None)
        # what was sent and has come back as a gradient is not kept
        y = torch.tanh(Product.apply(x, self.weights[stage], self.sinks[stage])) * 1.0
        if stage == self.schedule.num_stages - 1:
            return y.square().sum()
        self.outputs.append(weakref.ref(y))
        return y

    @contextmanager
    def no_sync(self):
        self.unsynced += 1
        yield


def walk(plan):
    schedule = build_schedule(**plan)
    rank = dist.get_rank()
    message = Message((ROWS, WIDTH), torch.float64, torch.device("cpu"))
    executor = PipelineExecutor(schedule, dist.group.WORLD, message)
    stages = Stages(schedule, rank)
    executor.forward_backward(stages.forward, no_sync=stages.no_sync)
    expected = gradients_of_one_process(schedule.num_stages, schedule.num_microbatches)
    for stage, sink in stages.sinks.items():
        torch.testing.assert_close(sink.sum, expected[stage], rtol=1e-12, atol=1e-12)
        assert sink.waits == 0
    backwards = [step for step in schedule.steps[rank] if step.kind in ("B", "I")]
    assert stages.unsynced == len(backwards) - schedule.chunks
    assert all(output() is None for output in stages.outputs), "outputs are kept after backward"
    stages.outputs.clear()
    executor.forward_only(stages.forward)
    wanted = 0 if executor.has_loss(schedule.chunks - 1) else schedule.num_microbatches
    assert len(stages.outputs) == wanted + (schedule.chunks - 1) * schedule.num_microbatches


@pytest.mark.parametrize(("name", "pp", "num_microbatches", "vpp"), PLANS)
def test_a_walk_gives_the_gradients_of_one_process(name, pp, num_microbatches, vpp):
    plan = {"name": name, "pp": pp, "num_microbatches": num_microbatches, "vpp": vpp}
    run_ranks(walk, pp, plan)


def _outputs_are_gone_before_their_backward():
    schedule = build_schedule("1f1b", pp=2, num_microbatches=4)
    message = Message((ROWS, WIDTH), torch.float64, torch.device("cpu"))
    executor = PipelineExecutor(schedule, dist.group.WORLD, message)
    stages = Stages(schedule, dist.get_rank())
    alive = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.append(stages.outputs[len(alive)]() is not None)
            return grad

    def forward(microbatch, chunk, pipeline_input):
        output = stages.forward(microbatch, chunk, pipeline_input)
        if dist.get_rank():
            return output
        watched = Watch.apply(output)
        stages.outputs[-1] = weakref.ref(watched)
        return watched

    executor.forward_backward(forward, no_sync=stages.no_sync)
    assert alive == [False] * (4 if dist.get_rank() == 0 else 0)


def test_outputs_that_were_sent_are_freed_before_their_backward():
    run_ranks(_outputs_are_gone_before_their_backward, 2)


def _weights_wait():
    schedule = build_schedule("zb-h1", pp=2, num_microbatches=4)
    message = Message((ROWS, WIDTH), torch.float64, torch.device("cpu"))
    executor = PipelineExecutor(schedule, dist.group.WORLD, message)
    stages = Stages(schedule, dist.get_rank())
    lengths = []
    right = WeightGradQueue.run

    def run(queue):
        lengths.append(len(queue))
        right(queue)

    WeightGradQueue.run = run  # this process ends with the test
    executor.forward_backward(stages.forward, no_sync=stages.no_sync)
    assert lengths == [1] * 4


def test_weight_gradients_are_made_in_their_own_step():
    run_ranks(_weights_wait, 2)


def _wrong_shape():
    schedule = build_schedule("1f1b", pp=2, num_microbatches=1)
    message = Message((ROWS + 1, WIDTH), torch.float64, torch.device("cpu"))
    executor = PipelineExecutor(schedule, dist.group.WORLD, message)
    stages = Stages(schedule, dist.get_rank())
    if dist.get_rank() == 1:  # gets what it waits for
        executor.forward_backward(stages.forward, no_sync=stages.no_sync)
        return
    with pytest.raises(AssertionError, match=r"activation of microbatch 0, stage 0 is \(3, 5\)"):
        executor.forward_backward(stages.forward, no_sync=stages.no_sync)
    buffer = torch.zeros(message.shape, dtype=message.dtype)
    dist.send(buffer, 1)
    dist.recv(buffer, 1)


def test_an_output_of_another_shape_is_named():
    run_ranks(_wrong_shape, 2)
