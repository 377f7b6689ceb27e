"""What a parameter is to the rest of the system: who reduces, decays, initialises and saves it.

One typed attribute a parameter, set when the parameter is made and never changed. Nothing here
asks for a rank: a role is written in global terms (global expert ids, global names).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

_ATTRIBUTE = "megatron_role"
GATED_PARTS = ("gate", "up")
"""Names of the halves of a gated layer's first weight; see ``Split.names``."""
TiedEnds = Literal["no", "here", "apart"]
_deferred: ContextVar[bool] = ContextVar("deferred_init", default=False)


@dataclass(frozen=True, kw_only=True)
class Init:
    """How the first value of a parameter is drawn."""

    kind: Literal["normal", "zeros", "ones"] = "normal"
    std: float = 0.02
    """Standard deviation of ``normal``."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A logical tensor in equal slices over the ranks of a group, of which a rank holds one.

    Each of ``parts`` is sliced on its own: rank 0 of 2 holds the first half of the gate and the
    first half of up, one behind the other, and so can multiply them without asking anybody.
    """

    over: Literal["tp", "expt_tp"]
    """The group, a field of ``ProcessGroupCollection``."""
    index: int
    """Which slice this is: the rank in the group."""
    count: int
    """Slices: the size of the group. A slice of one is the whole tensor."""
    dim: int
    """Dimension that is sliced, of the logical tensor: of one expert's, not of a stack."""
    parts: tuple[int, ...]
    """Lengths along ``dim`` of what is sliced on its own, in the whole tensor; they add up to its
    extent. ``(ffn, ffn)`` for gate and up."""
    names: tuple[str, ...] = ()
    """Of the parts, where checkpoints keep each as a tensor of its own: ``("gate", "up")``."""

    def __post_init__(self) -> None:
        """Refuse slices that are not equal; the user's options were checked before."""
        assert all(part % self.count == 0 for part in self.parts), f"slices differ: {self}"

    @property
    def lengths(self) -> list[int]:
        """Length along ``dim`` of this rank's slice of each part."""
        return [part // self.count for part in self.parts]

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this rank's slices of a tensor of ``shape``."""
        assert shape[self.dim] == sum(self.parts), f"{shape=} is not what is split: {self}"
        return (*shape[: self.dim], sum(self.lengths), *shape[self.dim + 1 :])

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor of which a rank's slices have ``shape``."""
        return (*shape[: self.dim], sum(self.parts), *shape[self.dim + 1 :])


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
    split: Split | None = None
    """How the logical tensor is spread over ranks; None when every rank of the data-parallel
    group and of the tensor-parallel one (``expt_tp`` for an expert) holds all of it."""
    sums_over_tp: bool = False
    """Every tensor-parallel rank holds all of it but uses it on other tokens (sequence
    parallelism) or other heads: gradients are summed over ``tp`` too."""
    tied_ends: TiedEnds = "no"
    """Embedding and output layer share it, on two pipeline stages: both of this rank (here), or on
    the first and the last rank (apart), each of which holds a copy and gets the sum of both
    gradients, over ``dp_cp_ends``. It is complete only after the last backward of every stage."""
    decays: bool = True
    """Weight decay applies. False for biases, norms and other vectors (see ``set_role``)."""

    @property
    def split_over(self) -> str | None:
        """Group whose ranks hold different slices; None when each holds the whole."""
        return self.split.over if self.split is not None and self.split.count > 1 else None


class LogicalShard(NamedTuple):
    """A block of a logical tensor that lies on this rank."""

    name: str
    """Global name of the logical tensor."""
    tensor: Tensor
    """The block, a view."""
    shape: tuple[int, ...]
    """Of the whole logical tensor."""
    offset: tuple[int, ...]
    """Where the block begins in it."""

    @property
    def region(self) -> tuple[slice, ...]:
        """The block as an index into the whole tensor."""
        ends = zip(self.offset, self.tensor.shape, strict=True)
        return tuple(slice(start, start + size) for start, size in ends)


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
    """Name the logical tensors in ``tensor``, which is a parameter or shaped like one.

    A stacked expert parameter gives one view for each expert, under its *global* id, so that the
    same keys come out whatever the number of expert-parallel ranks and whichever expert bank
    (``GroupedMLP`` or ``SequentialMLP``) holds them. Anything else is one piece under its name.
    Of a tensor that is split over ranks a view holds this rank's slices, one behind the other;
    ``logical_shards`` says where they belong.

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


def logical_shards(name: str, tensor: Tensor, role: ParamRole) -> Iterator[LogicalShard]:
    """Place the blocks of ``tensor`` in the logical tensors that they are part of.

    The shards of all ranks, replicas left out, tile every logical tensor. Those of one tensor
    follow each other.

    Args:
        name: See ``logical_tensors``.
        tensor: See ``logical_tensors``.
        role: See ``logical_tensors``.
    """
    split = role.split if role.split_over else None
    for key, piece in logical_tensors(name, tensor, role):
        shape, origin = tuple(piece.shape), (0,) * piece.dim()
        if split is None:
            yield LogicalShard(key, piece, shape, origin)
            continue
        start = 0
        for part, block in zip(split.parts, piece.split(split.lengths, split.dim), strict=True):
            place = start + split.index * (part // split.count)
            offset = (*origin[: split.dim], place, *origin[split.dim + 1 :])
            yield LogicalShard(key, block, split.whole_shape(shape), offset)
            start += part
