"""Weight gradients made within the backward that put them off, where it waits for the network."""

import pytest
import torch

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.weight_grad_queue import WeightGradQueue, make_while_waiting
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt, world_of_one
from tests.helpers.two_steps import loss_of


def _model() -> DistributedDataParallel:
    config = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=2000)
    return DistributedDataParallel(config, tiny_gpt(tiny_config()), pg_collection=world_of_one())


def _gradients(model: DistributedDataParallel) -> dict[str, torch.Tensor]:
    model.finish_grad_sync()
    return {name: p.main_grad.clone() for name, p in model.module.named_parameters()}


def _waits_in_backward(
    model: DistributedDataParallel, made: list[int], queue: WeightGradQueue
) -> None:
    """Wait for a network that is not there, behind the backward of each attention."""

    def wait(_: torch.Tensor) -> None:
        before = len(queue)
        make_while_waiting()
        made.append(before - len(queue))

    def watch(_: object, __: object, output: tuple[torch.Tensor, object]) -> None:
        output[0].register_hook(wait)

    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            layer.self_attention.register_forward_hook(watch)


@pytest.mark.parametrize("while_waiting", [True, False])
def test_what_was_put_off_is_made_where_backward_waits_and_gives_the_same_bits(while_waiting):
    model, batch = _model(), tiny_batch(samples=3, length=17, seed=1)
    model.zero_grad_buffer()
    loss_of(model, batch, 0).backward()
    want = _gradients(model)
    queue, made = WeightGradQueue(while_waiting=while_waiting), []
    _waits_in_backward(model, made, queue)
    model.zero_grad_buffer()
    loss = loss_of(model, batch, 0)
    with queue.collecting():
        loss.backward()
    left = len(queue)
    queue.run()
    got = _gradients(model)
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())
    assert left > 0
    assert all(made) if while_waiting else not any(made)
    assert len(made) >= 2


def test_without_a_queue_there_is_nothing_to_make():
    make_while_waiting()


def test_a_queue_that_collects_nothing_now_cannot_run_early():
    with pytest.raises(AssertionError, match="run early"):
        WeightGradQueue(while_waiting=True).run_so_far()
