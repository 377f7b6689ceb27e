"""I and W give the gradients of B, bit for bit, and each computes its own half."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.param_role import Init
from megatron.core.tensor_parallel.layers import Linear
from megatron.core.weight_grad_queue import WeightGradQueue
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.models import tiny_batch, tiny_config, tiny_gpt, world_of_one
from tests.helpers.two_steps import ORDERS, gradients, loss_of

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_z_loss_coeff": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "dense_tied": {},
    "dense_untied": {"untie_embeddings_and_output_weights": True, "add_bias_linear": False},
    "experts_looped": MOE | {"swiglu": True, "moe_shared_expert_intermediate_size": 36},
    "experts_grouped": MOE | {"moe_grouped_mm_backend": "torch_native", "add_bias_linear": False},
    "experts_grouped_with_bias": MOE | {"moe_grouped_mm_backend": "torch_native"},
    "experts_one_by_one": MOE | {"moe_experts_type": "sequential"},
    "experts_in_latent_space": MOE | {"moe_latent_size": 12, "add_bias_linear": False},
    "experts_in_chunks": MOE | {"moe_expert_chunk_tokens": 16},
    "recompute_full": MOE
    | {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute_parts": MOE
    | {
        "moe_shared_expert_intermediate_size": 36,
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "moe", "moe_act"],
    },
}
DTYPES: dict[str, dict[str, bool]] = {"fp64": {}, "bf16": {"fp64": False, "bf16": True}}


def _wrapped(**options: Any) -> DistributedDataParallel:
    options = {"hidden_dropout": 0.1, "attention_dropout": 0.1} | options
    config = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=2000)
    model = tiny_gpt(tiny_config(**options), spread=4.0)
    return DistributedDataParallel(config, model, pg_collection=world_of_one())


def _batches() -> list[tuple[Tensor, ...]]:
    return [tiny_batch(samples=3, length=17, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_two_steps_give_the_bits_of_one(case, dtype):
    model = _wrapped(**CASES[case], **DTYPES[dtype])
    want = gradients(model, _batches(), ORDERS["whole"])
    for name, order in ORDERS.items():
        if name == "some":  # microbatch 1 is added last: another sum
            continue
        got = gradients(model, _batches(), order)
        for key, gradient in want.items():
            assert gradient.any(), key
            assert torch.equal(got[key], gradient), f"{name}: gradient of {key}"


def test_one_microbatch_in_two_steps_among_whole_ones_loses_nothing():
    model = _wrapped()
    want = gradients(model, _batches(), ORDERS["whole"])
    for key, gradient in gradients(model, _batches(), ORDERS["some"]).items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-13, atol=1e-13)


class _Products(TorchDispatchMode):
    """Shapes of all matrix products, and of gradients of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "_grouped_mm"):
            self.shapes.append(tuple(result.shape))
        elif name == "embedding_dense_backward":
            self.shapes.append(("table", *result.shape))
        return result


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"experts_grouped_with_bias"}))
def test_the_input_step_makes_no_weight_gradient_and_the_weight_step_nothing_else(case):
    sizes = {"hidden_size": 56, "ffn_hidden_size": 88, "num_attention_heads": 2}
    model = _wrapped(**CASES[case], **sizes)  # no multiples of 16, as numbers of rows may be
    weights = set()
    for name, param in model.trainable_parameters():
        if "embedding" in name:
            weights |= {("table", *param.shape)}
        if "position" not in name and "bias" not in name and param.dim() > 1:
            weights |= {tuple(param.shape), tuple(param.shape[-2:])}
    batch = tiny_batch(samples=2, length=17)  # fewer rows than any weight but the router's
    whole, inputs, outer = _Products(), _Products(), _Products()
    model.zero_grad_buffer()
    loss = loss_of(model, batch, 0)
    with whole, model.no_sync():
        loss.backward()
    queue = WeightGradQueue()
    loss = loss_of(model, batch, 0)
    with inputs, model.no_sync(), queue.collecting():
        loss.backward()
    with outer:
        queue.run()
    assert Counter(inputs.shapes + outer.shapes) == Counter(whole.shapes)
    assert inputs.shapes
    found = weights & set(inputs.shapes)
    assert not found, found
    assert outer.shapes
    assert set(outer.shapes) <= weights


def _held(queue: WeightGradQueue) -> int:
    """Bytes of the storages that the entries of ``queue`` hold."""
    found, todo = {}, [entry.operands for entry in queue._put_off]
    while todo:
        one = todo.pop()
        if isinstance(one, Tensor):
            assert one.grad_fn is None, "it would keep the graph"
            found[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
        elif isinstance(one, list | tuple):
            todo += one
    return sum(found.values())


@pytest.mark.parametrize("case", CASES)
def test_only_what_the_weight_step_multiplies_outlives_the_input_step(case):
    model = _wrapped(**CASES[case])
    batch = tiny_batch(samples=3, length=17)
    model.zero_grad_buffer()
    queue = WeightGradQueue()
    with LiveBytes() as memory:
        loss = loss_of(model, batch, 0)
        with queue.collecting():
            loss.backward()
        del loss
        outside = sum(x.untyped_storage().nbytes() for x in batch)  # ids, which embeddings hold
        assert 0 < _held(queue) - outside <= memory.now <= _held(queue)
        before = memory.now
        queue.run()
        assert memory.now < 0.02 * before
    model.finish_grad_sync()


def test_a_linear_layer_holds_its_input_and_the_gradient_of_its_output():
    layer = Linear(16, 8, init=Init(), dtype=torch.float64)
    ddp = DistributedDataParallel(
        DistributedDataParallelConfig(), layer, pg_collection=world_of_one()
    )
    x = torch.randn(10, 16, dtype=torch.float64, requires_grad=True)
    queue = WeightGradQueue()
    with LiveBytes() as memory:
        y = ddp(x)[0].sin().sum()
        with queue.collecting():
            y.backward()
        del y
        assert x.grad is not None
        assert memory.now == 8 * (10 * 8 + x.grad.numel())
    assert len(queue) == 1


def test_frozen_weights_and_weights_without_sums_are_left_alone():
    layer = Linear(6, 4, init=Init(), dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    queue = WeightGradQueue()
    with queue.collecting():
        layer(x)[0].square().sum().backward()
    assert len(queue) == 0
    assert layer.weight.grad is not None, "nobody keeps a sum: it is made at once"
    layer.weight.grad = None
    layer.weight.requires_grad_(False)
    queue = WeightGradQueue()
    with queue.collecting():
        layer(x)[0].square().sum().backward()
    assert len(queue) == 0
    assert layer.weight.grad is None


def _collected() -> tuple[DistributedDataParallel, WeightGradQueue]:
    model, queue = _wrapped(), WeightGradQueue()
    model.zero_grad_buffer()
    loss = loss_of(model, tiny_batch(), 0)
    with queue.collecting():
        loss.backward()
    return model, queue


def test_sums_before_the_weight_step_are_refused_and_the_parameters_named():
    model, queue = _collected()
    with pytest.raises(AssertionError, match=r"finish_grad_sync\(\) before .* such as embedding"):
        model.finish_grad_sync()
    with pytest.raises(AssertionError, match="zero_grad_buffer"):
        model.zero_grad_buffer()
    queue.run()
    model.finish_grad_sync()


def test_a_queue_runs_once_and_collects_once():
    model, queue = _collected()
    with (
        pytest.raises(AssertionError, match="cannot collect: it has"),
        queue.collecting(),
    ):
        pass
    queue.run()
    for act in (queue.run, lambda: queue.put((), list)):
        with pytest.raises(AssertionError, match="it was run"):
            act()
    model.finish_grad_sync()
    with pytest.raises(AssertionError, match="cannot run: it collected nothing"):
        WeightGradQueue().run()


def test_only_one_queue_collects_and_none_after_a_failure():
    first, second = WeightGradQueue(), WeightGradQueue()
    with first.collecting():
        with pytest.raises(AssertionError, match="cannot run: it still collects"):
            first.run()
        with pytest.raises(AssertionError, match="another queue collects"), second.collecting():
            pass
    with pytest.raises(ZeroDivisionError), second.collecting():
        raise ZeroDivisionError
    with pytest.raises(AssertionError, match="its backward failed"):
        second.run()
    with WeightGradQueue().collecting():
        pass  # nobody is left collecting


def test_a_weight_gradient_put_off_after_the_sums_is_refused():
    model, queue = _collected()
    queue.run()
    model.finish_grad_sync()
    loss = loss_of(model, tiny_batch(), 0)
    late = WeightGradQueue()
    with pytest.raises(AssertionError, match="after finish_grad_sync"), late.collecting():
        loss.backward()
