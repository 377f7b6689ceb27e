"""How much memory tensors take: alive now, at most since the start, and kept for backward.

Counts storages, not views. Works on a CPU, where nothing else tells.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated inside the block and not freed; also by backward, run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self._note(one, 0)  # was there before, or is counted already
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._note(one, one.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self.now += size
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


@contextmanager
def kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Collect storage -> bytes of every tensor that the block saves for backward.

    Parameters of ``module`` are left out. What functions keep on themselves is not seen here but
    in ``kept_on_nodes``.
    """
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def kept_on_nodes(output: Tensor) -> dict[int, int]:
    """Return storage -> bytes of what functions behind ``output`` hold by themselves."""
    found, todo, seen = {}, [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        for value in vars(node).values() if hasattr(node, "__dict__") else ():
            for tensor in _tensors(value):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return {key: size for key, size in found.items() if size}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("megatron"):
        for one in vars(value).values():
            yield from _tensors(one)
