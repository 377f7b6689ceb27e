"""What a parameter is to the rest of the system: who reduces, decays, initialises and saves it.

One typed attribute a parameter, set when the parameter is made and never changed. Nothing here
asks for a rank: a role is written in global terms (global expert ids, global names).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

_ATTRIBUTE = "megatron_role"
_deferred: ContextVar[bool] = ContextVar("deferred_init", default=False)


@dataclass(frozen=True, kw_only=True)
class Init:
    """How the first value of a parameter is drawn."""

    kind: Literal["normal", "zeros", "ones"] = "normal"
    std: float = 0.02
    """Standard deviation of ``normal``."""


@dataclass(frozen=True, kw_only=True)
class ParamRole:
    """The facts about a parameter that its tensor cannot say."""

    init: Init
    is_expert: bool = False
    """Gradients are summed over the expert-data-parallel group, not over all data ranks."""
    expert_ids: tuple[int, ...] | None = None
    """Global ids of the experts stacked along dim 0; None when nothing is stacked."""
    expert_name: str = ""
    """With ``expert_ids``: name of one expert's slice, such as ``linear_fc1.weight``."""
    decays: bool = True
    """Weight decay applies. False for biases, norms and other vectors (see ``set_role``)."""


def set_role(param: nn.Parameter, role: ParamRole) -> nn.Parameter:
    """Attach ``role`` to ``param``, draw its first value, and return it.

    The value comes from torch's global generator, as in any torch module, so that a layer used on
    its own works. A run draws by global names instead (``init_weights``) and makes its model under
    ``deferred_init``.
    """
    setattr(param, _ATTRIBUTE, role)
    if not _deferred.get() and param.device.type != "meta":
        draw_(param, role.init)
    return param


def draw_(tensor: Tensor, init: Init, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``tensor`` as ``init`` says, from ``generator`` or torch's global one; return it."""
    with torch.no_grad():
        if init.kind == "normal":
            return tensor.normal_(std=init.std, generator=generator)
        return tensor.fill_(0.0 if init.kind == "zeros" else 1.0)


@contextmanager
def deferred_init() -> Iterator[None]:
    """Leave parameters undrawn: whoever makes the model here fills every one of them later."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def role_of(param: Tensor) -> ParamRole:
    """Return the role that ``set_role`` attached; a parameter without one is a bug."""
    role = getattr(param, _ATTRIBUTE, None)
    assert role is not None, f"parameter of shape {tuple(param.shape)} was made without a role"
    return role  # type: ignore[no-any-return]


def logical_tensors(name: str, tensor: Tensor, role: ParamRole) -> Iterator[tuple[str, Tensor]]:
    """Name the layout-independent pieces of ``tensor``, which is a parameter or shaped like one.

    A stacked expert parameter gives one view for each expert, under its *global* id, so that the
    same keys come out whatever the number of expert-parallel ranks and whichever expert bank
    (``GroupedMLP`` or ``SequentialMLP``) holds them. Anything else is one piece under its name.

    Args:
        name: Dotted parameter name in the model, such as
            ``decoder.layers.0.mlp.experts.weight1``.
        tensor: The parameter, its gradient or an optimizer moment of it; views are returned.
        role: Role of the parameter.

    Yields:
        (global name, view), such as
        ``("decoder.layers.0.mlp.experts.local_experts.5.linear_fc1.weight", [ffn, h])``.
    """
    if role.expert_ids is None:
        yield name, tensor
        return
    bank = name.rpartition(".")[0]
    for piece, expert in zip(tensor.unbind(0), role.expert_ids, strict=True):
        yield f"{bank}.local_experts.{expert}.{role.expert_name}", piece
