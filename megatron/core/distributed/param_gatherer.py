"""When the weights that other ranks stepped are gathered, and who waits for them.

Every rank launches the same buckets in the same order, that of the next forward. Easy to break: a
module that reads weights without being called must be part of a module that is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from megatron.core.distributed.bucket_layout import Bucket
from megatron.core.distributed.grad_reducer import Pending


class ParamGatherer:
    """Gathers the buckets of a sharded model after a step."""

    def __init__(
        self, buckets: Sequence[Bucket], launch: Callable[[Bucket], Pending | None]
    ) -> None:
        """Begin with nothing under way.

        Args:
            buckets: All buckets in the order in which backward fills them.
            launch: Starts the gather of one; returns what to wait for, or None.
        """
        self._order = tuple(reversed(range(len(buckets))))
        self._buckets = tuple(buckets)
        self._launch = launch
        self._pending: dict[int, Pending] = {}

    def start(self) -> None:
        """Launch the gathers of all buckets."""
        assert not self._pending, "the gathers of the step before were not waited for"
        for number in self._order:
            work = self._launch(self._buckets[number])
            if work is not None:
                self._pending[number] = work

    def finish(self, numbers: Iterable[int] | None = None) -> None:
        """Wait for the buckets of these numbers, or for all."""
        for number in self._order if numbers is None else numbers:
            work = self._pending.pop(number, None)
            if work is not None:
                work.wait()

    def watch(self, model: nn.Module, number_of: Mapping[Tensor, int]) -> None:
        """Let the parts of ``model`` wait, when they are called, for the weights they hold.

        Args:
            model: The model.
            number_of: Parameter -> its number in registration order.
        """
        bucket_of = {p: n for n, bucket in enumerate(self._buckets) for p in bucket.params}
        for module, params in waiting_modules(model):
            numbers = [bucket_of[number_of[param]] for param in params if param in number_of]
            if numbers:
                module.register_forward_pre_hook(self._waiter(sorted(set(numbers), reverse=True)))

    def _waiter(self, numbers: Sequence[int]) -> Callable[..., None]:
        def wait(*_: object) -> None:
            if self._pending:
                self.finish(numbers)

        return wait


def waiting_modules(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield (module, parameters that it waits for), every parameter at least once.

    A member of the outermost lists of modules, such as a layer, waits for all that is in it, and
    so does what lies beside those lists; their owners wait for parameters of their own.
    """
    if not any(_is_list(module) for module in model.modules()):
        yield model, list(model.parameters())
        return
    if _is_list(model):
        for member in model.children():
            yield member, list(member.parameters())
        return
    yield model, list(model.parameters(recurse=False))
    for child in model.children():
        yield from waiting_modules(child)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)
