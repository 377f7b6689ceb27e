"""Whether operations on a CPU take compiled kernels or torch's own: one choice for a process.

``--cpu-kernels`` sets it. A layer asks ``kernel`` for what it needs and takes torch's path where
the answer is None; both compute the same function, their last bits differ.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

from megatron.core.cpu_kernels.build import compiler, kernel_folder
from megatron.core.errors import BackendError

log = logging.getLogger(__name__)

Choice = Literal["auto", "compiled", "torch"]
Made = TypeVar("Made")

_REMEDY = (
    "install one that knows -march=native (the variable CXX says which), or use --cpu-kernels torch"
)

_choice: Choice = "auto"
_made: dict[str, Any] = {}
_failed: dict[str, str] = {}


def use(choice: Choice) -> None:
    """Take compiled kernels where they can be had (auto), always (compiled), or never (torch).

    Raises:
        BackendError: "compiled", and there is no compiler.
    """
    global _choice
    if choice == "compiled" and compiler() is None:
        raise BackendError("--cpu-kernels compiled: there is no C++ compiler; " + _REMEDY)
    _choice = choice


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Choose for the length of a ``with`` block."""
    before = _choice
    use(choice)
    try:
        yield
    finally:
        use(before)


def kernel(what: str, make: Callable[[], Made]) -> Made | None:
    """Return the kernel ``what``, made by ``make`` at the first call in a process.

    Args:
        what: Names it, with its dtype, in messages: "attention in bfloat16".
        make: Compiles, loads and tries it out; raises BackendError where it cannot be had.

    Returns:
        The kernel; None to compute with torch.

    Raises:
        BackendError: The choice is "compiled" and it cannot be had.
    """
    if _choice == "torch":
        return None
    if what in _made:
        return _made[what]
    if what not in _failed:
        try:
            with _untouched():
                _made[what] = make()
            return _made[what]
        except (BackendError, OSError, AttributeError) as error:
            _failed[what] = str(error)
            if _choice == "auto":
                log.warning("%s is not compiled, torch computes it: %s", what, error)
    if _choice == "compiled":
        raise BackendError(f"--cpu-kernels compiled: {what}: {_failed[what]}; {_REMEDY}")
    return None


@contextmanager
def _untouched() -> Iterator[None]:
    """Let a kernel be tried out as in a new process, wherever a run first needs it.

    That may be without gradients, or where tensors are made on another device; and what is tried
    out must not move the run's random numbers.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def is_for(tensor: torch.Tensor) -> bool:
    """Whether kernels could compute with ``tensor``: real memory of a CPU, bf16 or fp32."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    )


def describe() -> str:
    """Return a sentence for the log about what was chosen."""
    if _choice == "torch":
        return "torch's kernels (--cpu-kernels torch)"
    command = compiler()
    if command is None:
        return "torch's kernels (no C++ compiler)"
    folder = kernel_folder()
    kept = f"kept in {folder}" if folder else "not kept"
    return f"kernels compiled by {command[0]}, {kept}"
