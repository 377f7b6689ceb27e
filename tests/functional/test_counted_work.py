"""A training step does no more than it did: calls, allocations, operations, collectives; no times.

Ceilings are in counted_work.json; ``counted_work_ceilings.py`` says how to move them.
"""

import pytest
import torch

from megatron.core.cpu_kernels.build import compiler
from tests.functional.counted_work_ceilings import COLLECTIVES, advice, ceilings, grown
from tests.helpers.counted_work import (
    MICROBATCHES,
    TOKENS,
    VOCABULARY,
    CountedCalls,
    CountedOps,
    counted_step,
)

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def work_of():
    """Return a function: kernels, bf16 -> the work of a step, counted once."""
    done = {}

    def count(kernels, bf16):
        if (kernels, bf16) not in done:
            done[kernels, bf16] = counted_step(kernels, bf16=bf16)
        return done[kernels, bf16]

    return count


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kernels", ["torch", pytest.param("compiled", marks=needs_compiler)])
def test_a_step_does_no_more_than_it_did(kernels, bf16, work_of):
    name = f"step, {kernels}, {'bf16' if bf16 else 'fp32'}"
    work = work_of(kernels, bf16)
    lines = grown(name, work.numbers(), ceilings()[name])
    assert not lines, advice(lines, work.largest)


@pytest.mark.parametrize("name", list(COLLECTIVES))
def test_two_ranks_send_no_more_than_they_did(name):
    lines = grown(name, COLLECTIVES[name](), ceilings()[name])
    assert not lines, advice(lines)


def test_logits_of_the_whole_vocabulary_are_kept_once_and_never_widened(work_of):
    for bf16 in (False, True):
        assert work_of("torch", bf16).whole_logits <= MICROBATCHES
    assert work_of("torch", True).largest_bytes < TOKENS * VOCABULARY * 4


def test_steps_are_counted_alike_twice(work_of):
    assert counted_step("torch", bf16=False) == work_of("torch", False)


def test_what_grew_is_named_with_its_size_and_the_way_to_accept_it():
    allowed = {"dispatched_calls": 100, "allocated_bytes": 1000}
    assert not grown("step", {"dispatched_calls": 100, "allocated_bytes": 1030}, allowed)
    assert not grown("step", {"dispatched_calls": 90}, allowed)
    lines = grown("step", {"dispatched_calls": 101, "allocated_bytes": 1031, "new": 1}, allowed)
    assert lines == [
        "step: dispatched_calls: 101 instead of 100 (+1.0%)",
        "step: allocated_bytes: 1,031 instead of 1,000 (+3.1%)",
        "step: new: 1, which has no ceiling: it is new",
    ]
    text = advice(lines, ["mm (8, 8) float32: 256"])
    assert "counted_work_ceilings --write" in text
    assert "mm (8, 8)" in text


def test_operations_allocations_and_products_are_counted():
    x, out = torch.ones(3, 4, requires_grad=True), torch.empty(3, 5)
    weight = torch.ones(4, 5)
    with CountedOps() as ops:
        (x @ weight).sum().backward()  # products: forward, and the gradient of x
        torch.mm(x.detach(), weight, out=out)
        out.add_(1.0)
        out.view(5, 3)
    assert ops.flops == 3 * 2 * 3 * 4 * 5
    assert ops.by_op["mm"] == 3
    sizes = sorted(size for size, _, what in ops.made if what.startswith("mm "))
    assert sizes == [4 * 3 * 4, 4 * 3 * 5]  # out= allocates nothing
    assert not [what for _, _, what in ops.made if what.startswith(("add_", "view"))]


def test_calls_of_python_functions_are_counted():
    def two_calls():
        return (lambda: 1)()

    with CountedCalls() as calls:
        two_calls()
    assert calls.all == 3  # and the end of the block
    assert calls.ours == 0
