"""A GPU that is not there: code takes its way, a CPU computes, and the host's waits are noted.

Inside ``PretendedDevice`` a tensor made on ``CUDA``, or computed from one, says that it is on that
device (``is_cuda``, ``device``), so that our code takes its branches for CUDA; its memory is a
CPU's and its numbers are real. Noted with their place in our code: numbers that are brought to
the host, results whose size depends on data, and copies to the device that are not non_blocking.
An operation of a tensor of the host and one of the device is an error, as it is on a real one.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_ROOT = str(Path(__file__).parents[2] / "megatron")
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.item.default, _aten.equal.default}
_SIZED_BY_DATA = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_TO_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class Waits(list[tuple[str, str]]):
    """(file, function) of our code that made the host wait, in order; repeats are left out."""

    def note(self) -> None:
        """Add the place that is running."""
        frame = sys._getframe(1)
        while not frame.f_code.co_filename.startswith(_ROOT):
            if frame.f_back is None:
                return  # the test itself
            frame = frame.f_back
        place = Path(frame.f_code.co_filename).name, frame.f_code.co_name
        if self[-1:] != [place]:
            self.append(place)


class _Memory:
    """Which storages are the device's. A weak reference keeps an address from being used again."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self.is_inside = False
        """In a function of torch that has tensors of the device: what it makes is there too."""

    def has(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.layout is torch.strided
            and tensor.untyped_storage()._cdata in self._storages
        )

    @contextmanager
    def called(self, args: Any) -> Iterator[None]:
        before, self.is_inside = self.is_inside, any(map(self.has, tree_leaves(args)))
        try:
            yield
        finally:
            self.is_inside = before

    def take(self, results: Any) -> Any:
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)
        return results


class _Operations(TorchDispatchMode):
    """What is computed from tensors of the device is on the device."""

    def __init__(self, memory: _Memory, waits: Waits) -> None:
        super().__init__()
        self.memory, self.waits = memory, waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        mine = [x for x in tensors if self.memory.has(x)]
        if not mine:
            made = func(*args, **kwargs)
            return made if tensors or not self.memory.is_inside else self.memory.take(made)
        if func in _READS or func in _SIZED_BY_DATA:
            self.waits.note()
        strangers = [x for x in tensors if x.dim() and not self.memory.has(x)]
        if func in _INDEXED:  # by a mask, or by a list, which is copied there
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool or not self.memory.has(i) for i in indices):
                self.waits.note()
            strangers = []
        if func is _aten.copy_.default and strangers:
            if not ((len(args) > 2 and args[2]) or kwargs.get("non_blocking")):
                self.waits.note()
            return func(*args, **kwargs)
        assert not strangers, f"{func} of tensors of the host and of the device"
        return self.memory.take(func(*args, **kwargs))


class _Answers(TorchFunctionMode):
    """What tensors say of their device; and makers of tensors that are told a device."""

    def __init__(self, memory: _Memory, waits: Waits) -> None:
        super().__init__()
        self.memory, self.waits = memory, waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.is_cuda.__get__:  # made anew each time, hence not "is"
            return self.memory.has(args[0])
        if func == Tensor.device.__get__:
            return CUDA if self.memory.has(args[0]) else func(*args)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func in _TO_PYTHON and self.memory.has(args[0]):
            self.waits.note()
        if "device" in kwargs and kwargs["device"] is not None:
            on_device = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = CPU
            made = func(*args, **kwargs)
            if on_device and func in _FROM_HOST:
                self.waits.note()
            return self.memory.take(made) if on_device else made
        with self.memory.called(args):
            return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source, was = args[0], self.memory.has(args[0])
        wanted, dtype, flags = was, kwargs.get("dtype"), []
        for x in (*args[1:], kwargs.get("device"), kwargs.get("other")):
            if isinstance(x, str | torch.device):
                wanted = torch.device(x).type == "cuda"
            elif isinstance(x, Tensor):
                wanted, dtype = self.memory.has(x), x.dtype
            elif isinstance(x, torch.dtype):
                dtype = x
            elif isinstance(x, bool):
                flags.append(x)
        if func in (Tensor.cpu, Tensor.cuda):
            wanted, flags = func is Tensor.cuda, []
        non_blocking = kwargs.get("non_blocking") or flags[:1] == [True]
        out = source.to(source.dtype if dtype is None else dtype, copy=flags[1:2] == [True])
        if wanted == was:
            return out
        if was or not non_blocking:
            self.waits.note()
        if wanted:
            return self.memory.take(out.clone())
        with _pop_mode_temporarily():  # else it would stay on the device
            return out.clone()


@contextmanager
def pretended_device() -> Iterator[Waits]:
    """Pretend inside the block; gives the waits, which the caller may clear."""
    memory, waits = _Memory(), Waits()
    with _Operations(memory, waits), _Answers(memory, waits):
        yield waits
