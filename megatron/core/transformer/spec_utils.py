"""Specs: which class fills each slot of a layer, decided once, when the model is described."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModuleSpec:
    """A class that is yet to be built, with what is already known about it."""

    module: type
    """Class (an ``nn.Module``) that ``build_module`` calls."""
    submodules: Any = None
    """Passed on as ``submodules=``; the dataclass of slots that ``module`` declares."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``module`` that the spec decides, such as ``{"causal": False}``."""


def build_module(spec: ModuleSpec | type, *args: Any, **kwargs: Any) -> Any:
    """Build what ``spec`` describes.

    Args:
        spec: A spec, or a bare class, which stands for a spec without submodules and params.
        args: Positional arguments of the class.
        kwargs: Keyword arguments of the class; they win over ``spec.params``.

    Returns:
        An instance of the class. ``Any``, because only the caller knows which protocol the slot
        asks for.
    """
    if isinstance(spec, type):
        return spec(*args, **kwargs)
    extra = {} if spec.submodules is None else {"submodules": spec.submodules}
    return spec.module(*args, **{**spec.params, **extra, **kwargs})
