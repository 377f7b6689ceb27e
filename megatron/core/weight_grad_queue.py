"""Backward in two steps: I makes the gradients of inputs, W those of weights, when time is idle.

While a queue collects, functions that make weight gradients put them off into it and return none;
``run`` makes them in the order in which backward came by. Easy to break: what is put off holds the
tensors that it multiplies, and nothing else: neither ``ctx`` nor the graph behind a saved tensor.

Source: Qi et al. 2023, zero-bubble pipeline parallelism (arXiv:2401.10241), section 2.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core.grad_sink import GradSink, given


class _State(Enum):
    EMPTY = "it collected nothing yet"
    COLLECTING = "it still collects"
    FULL = "it has collected"
    FAILED = "its backward failed"
    DONE = "it was run"


class LateOperand(ABC):
    """An operand that comes over the network, and may be asked for early."""

    @abstractmethod
    def launch(self) -> None:
        """Start to fetch it, unless that was done; every rank of its group does at this point."""


class _PutOff(NamedTuple):
    add: Callable[..., None]
    """Makes gradients and adds them to their sums."""
    operands: tuple[Any, ...]
    """What it is called with."""
    sinks: tuple[GradSink, ...]
    """Of the parameters concerned."""


class WeightGradQueue:
    """The weight gradients of one backward, put off.

    One backward under ``collecting`` (step I), then ``run`` once (step W), in any order with those
    of other queues; what a parameter sums up in the order of the ``run`` calls is bit for bit what
    whole backwards in that order give. ``DistributedDataParallel`` waits: a parameter whose
    gradient was put off outside ``no_sync`` is reduced after its ``run``, and
    ``finish_grad_sync`` raises while a gradient is still put off.

    A weight without a sink (``grad_sink_of``) gets its gradient in I.
    """

    def __init__(self, *, while_waiting: bool = False) -> None:
        """Begin empty.

        Args:
            while_waiting: Make what was put off so far wherever the backward itself waits for the
                network, see ``make_while_waiting``.
        """
        self.while_waiting = while_waiting
        self._put_off: deque[_PutOff] = deque()
        self._state = _State.EMPTY

    def __len__(self) -> int:
        """Return how many entries wait for ``run``."""
        return len(self._put_off)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Make no weight gradients in backward; put them off into this queue. Once."""
        global _collecting  # backward may run in a thread of autograd's, which sees no ContextVar
        self._expect(_State.EMPTY, "collect")
        assert _collecting is None, "another queue collects already: one backward at a time"
        self._state, _collecting = _State.COLLECTING, self
        try:
            yield
            self._state = _State.FULL
        finally:
            _collecting = None
            if self._state is _State.COLLECTING:
                self._state = _State.FAILED

    def put(self, sinks: Sequence[GradSink], add: Callable[..., None], *operands: Any) -> None:
        """Put off ``add(*operands)``, which makes the gradients of the parameters of ``sinks``.

        Args:
            sinks: Each is noted as put off now, and settled when ``add`` was called.
            add: Makes the gradients and adds them to what the sinks return; holds no tensor.
            operands: Tensors are cut off from the graph, which they would keep alive. A late one
                is launched in ``run``.
        """
        self._expect(_State.COLLECTING, "put off")
        for sink in sinks:
            sink.put_off()
        self._put_off.append(_PutOff(add, tuple(map(_alone, operands)), tuple(sinks)))

    @torch.no_grad()
    def run(self) -> None:
        """Make the gradients that were put off, first in, first out, freeing what each held.

        Late operands of the next are fetched under the products of one.
        """
        self._expect(_State.FULL, "run")
        self._state = _State.DONE
        while self._put_off:
            for late in (x for entry in islice(self._put_off, 2) for x in entry.operands):
                if isinstance(late, LateOperand):
                    late.launch()
            add, operands, sinks = self._put_off.popleft()
            add(*operands)
            del operands  # before the next makes its own
            for sink in sinks:
                sink.settle()

    def run_so_far(self) -> None:
        """Do ``run`` of what the backward, which goes on, has put off until here."""
        self._expect(_State.COLLECTING, "run early")
        self._state = _State.FULL
        self.run()
        self._state = _State.COLLECTING

    def _expect(self, state: _State, act: str) -> None:
        assert self._state is state, f"a WeightGradQueue cannot {act}: {self._state.value}"


_collecting: WeightGradQueue | None = None


def collecting_queue() -> WeightGradQueue | None:
    """Return the queue that weight gradients are put off into; None where they are made at once."""
    return _collecting


def is_put_off(sink: GradSink | None) -> bool:
    """Return whether ``weight_gradient`` puts off a gradient for ``sink`` now."""
    return _collecting is not None and sink is not None


def make_while_waiting() -> None:
    """Make the weight gradients of the backward under way so far, if its queue was made for that.

    To be called in a backward between the launch of a collective and the wait for it.
    """
    if _collecting is not None and _collecting.while_waiting:
        _collecting.run_so_far()


def weight_gradient(
    sink: GradSink | None,
    make: Callable[..., Tensor],
    *operands: Any,
    add: Callable[..., None] | None = None,
) -> Tensor | None:
    """Make a weight gradient for its sink, now or in the W step; called in backward.

    Args:
        sink: Of the weight; without one nothing is put off.
        make: Returns the gradient; holds no tensor.
        operands: What ``make`` is called with.
        add: Called with the sum and ``operands``, adds the gradient to the sum where there is one,
            if that is cheaper than to make it and add it.

    Returns:
        What autograd is to be given: None but for a weight without a sink.
    """
    if sink is None:
        return make(*operands)
    if _collecting is None:
        _add(sink, make, add, *operands)
    else:
        _collecting.put((sink,), _add, sink, make, add, *operands)
    return None


def _add(
    sink: GradSink, make: Callable[..., Tensor], add: Callable[..., None] | None, *operands: Any
) -> None:
    if add is None:
        given(make(*operands), sink)
    else:
        add(sink(), *operands)


def _alone(operand: Any) -> Any:
    return operand.detach() if isinstance(operand, Tensor) else operand
