"""Tensors without data, of which a few numbers are known all the same.

Everything runs on ``FakeTensor``: shapes, dtypes, aliases and autograd are real, values are not.
But code asks the host for counts, and lets shapes depend on them. So what is small and follows from
known numbers alone (token counts, routing maps, masks) is computed beside the fake tensor.
Easy to break: a known tensor that is written to with unknown numbers is unknown from then on.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

_VALUE = "megatron_known_value"
_MOST_ELEMENTS = 1 << 23
"""Of what is computed beside."""
_MOST_FLOATS = 1 << 21
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
"""What has no numbers yet: integers are taken for zeros, floats are not known."""


class UnknownValueError(Exception):
    """Code asked for a number that follows from no known one."""


def known(tensor: Tensor) -> Tensor | None:
    """Return the numbers of ``tensor``, or None where they are not known."""
    if not isinstance(tensor, FakeTensor):
        return tensor.detach() if tensor.requires_grad else tensor
    return getattr(tensor, _VALUE, None)


def make_known(tensor: Tensor, value: Tensor) -> None:
    """Say what the numbers of a fake ``tensor`` are."""
    assert tensor.shape == value.shape, f"{tensor.shape=} {value.shape=}"
    setattr(tensor, _VALUE, value)


def write_known(tensor: Tensor, value: Tensor | None) -> None:
    """Write ``value`` into a fake ``tensor``, and into what shares its memory where known."""
    if value is None:
        forget(tensor)
        return
    old = known(tensor)
    with no_dispatch():
        value = value.reshape(tensor.shape)
        if old is not None:
            old.copy_(value)
    if old is None:
        make_known(tensor, value)


def forget(tensor: Tensor) -> None:
    """Make the numbers of ``tensor`` unknown."""
    if isinstance(tensor, FakeTensor) and getattr(tensor, _VALUE, None) is not None:
        setattr(tensor, _VALUE, None)


class LiveStorages:
    """Bytes of all tensors that are alive: now, and at most since ``peak`` was set."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def note(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.ref(storage, lambda _: self._freed(key, size))

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class KnownValues(TorchDispatchMode):
    """Lies on top of a ``FakeTensorMode``; keeps known numbers, and counts what is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = LiveStorages()
        self._is_view: dict[Any, bool] = {}
        self._written: dict[Any, tuple[tuple[int, str], ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._number(args[0])
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._from_values(func, args, kwargs)
        if isinstance(result, (FakeTensor, tuple, list)):
            self._follow(func, args, kwargs, result)
        return result

    def _number(self, tensor: Tensor) -> Any:
        value = known(tensor)
        if value is not None:
            with no_dispatch():
                return value.item()
        if tensor.dtype.is_floating_point:
            return 1.0  # a loss, a norm: finite
        raise UnknownValueError(f"a number of {tensor.dtype} that depends on unknown ones")

    def _from_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make the result of an op whose shape depends on numbers."""
        inputs = _values((args, kwargs))
        if inputs is None:
            raise UnknownValueError(f"the shape of {func} depends on unknown numbers")
        with no_dispatch():
            value = func(*inputs[0], **inputs[1])
        results = [value] if isinstance(value, Tensor) else value
        made = []
        for one in results:
            fake = torch.empty(one.shape, dtype=one.dtype, device=one.device)
            make_known(fake, one)
            self.live.note(fake)
            made.append(fake)
        return made[0] if isinstance(value, Tensor) else type(value)(made)

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keep known what follows from known numbers, and count new storages."""
        outputs = list(_tensors(result))
        if not self._makes_views(func):
            for output in outputs:
                self.live.note(output)
        written = self._written_by(func)
        inputs = None
        if all(map(_is_small, outputs)) and torch.Tag.nondeterministic_seeded not in func.tags:
            inputs = _values((args, kwargs))
        if inputs is None:
            for place, name in written:
                for tensor in _tensors(kwargs.get(name, _at(args, place))):
                    forget(tensor)
            return
        with no_dispatch():
            value = func(*inputs[0], **inputs[1])
            if func in _EMPTY:
                value = None if value.dtype.is_floating_point else value.zero_()
        if written or value is None:
            return  # it was written into the values themselves
        for output, one in zip(outputs, _tensors(value), strict=True):
            setattr(output, _VALUE, one)

    def _makes_views(self, func: Any) -> bool:
        found = self._is_view.get(func)
        if found is None:
            returns = func._schema.returns
            found = self._is_view[func] = any(one.alias_info is not None for one in returns)
        return found

    def _written_by(self, func: Any) -> tuple[tuple[int, str], ...]:
        found = self._written.get(func)
        if found is None:
            found = self._written[func] = tuple(
                (place, argument.name)
                for place, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            )
        return found


def _is_small(tensor: Tensor) -> bool:
    limit = _MOST_FLOATS if tensor.dtype.is_floating_point else _MOST_ELEMENTS
    return tensor.numel() <= limit


def _at(args: Any, place: int) -> Any:
    return args[place] if place < len(args) else None


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for one in tree:
            yield from _tensors(one)


class _UnknownError(Exception):
    pass


def _values(tree: Any) -> Any:
    """Return ``tree`` with the numbers of its tensors, or None if some are not known."""
    try:
        return _replaced(tree)
    except _UnknownError:
        return None


def _replaced(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        value = known(tree)
        if value is None:
            raise _UnknownError
        return value
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(_replaced, tree))
    if isinstance(tree, dict):
        return {key: _replaced(value) for key, value in tree.items()}
    return tree
