"""Where the gradient of a parameter may go straight away: the sum over the backwards of a step.

Who owns the sums (DistributedDataParallel) offers a sink; an autograd function that makes weight
gradients itself may take it, add to the sum and return None. Easy to break: either all of a
backward's gradient goes into the sink or all of it is returned; never the same part twice.
"""

from typing import Protocol

from torch import Tensor

_ATTRIBUTE = "megatron_grad_sink"


class GradSink(Protocol):
    """The way into the sum of one parameter."""

    def __call__(self) -> Tensor:
        """Return the sum to add to, shaped like the parameter and perhaps wider than it.

        To be called once for each backward, in it or after ``put_off``: only then is it known
        whether a gradient may still come.
        """

    def put_off(self) -> None:
        """Note, in a backward, that a gradient of it will be added later: the sum is not whole."""

    def settle(self) -> None:
        """Note that a gradient that was put off has been added."""


def offer_grad_sink(param: Tensor, sink: GradSink) -> None:
    """Let functions add gradients of ``param`` to what ``sink`` returns, and return None."""
    setattr(param, _ATTRIBUTE, sink)


def grad_sink_of(param: Tensor | None) -> GradSink | None:
    """Return the sink of ``param``; None where its gradient is to be returned as usual.

    To be asked in the forward: in backward a saved tensor may be a copy without attributes.
    """
    return getattr(param, _ATTRIBUTE, None)


def given(gradient: Tensor | None, sink: GradSink | None) -> Tensor | None:
    """Add ``gradient`` to its sink and return None; the gradient itself where there is no sink.

    What it returns is what autograd is to be given. Parameters of bf16 that are used several times
    in a backward, as in chunks, are summed wide then.
    """
    if gradient is None or sink is None:
        return gradient
    sink().add_(gradient)
    return None
