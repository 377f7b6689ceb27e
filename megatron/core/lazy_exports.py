"""Names that a package offers and imports when they are first used: Megatron's short import paths.

``from megatron.core.optimizer import get_megatron_optimizer`` works, and ``--help``, which passes
through the same packages on its way to option classes, never waits for torch.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that finds each name of ``homes`` in its module.

    Args:
        package: ``__name__`` of the package, for the error message.
        homes: Public name -> dotted module that defines it. A module that has no such attribute
            is itself what the name stands for (``mpu`` is ``parallel_state``).
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(homes[name])
        return getattr(module, name, module)

    return find
