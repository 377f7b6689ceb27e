"""Which parameters share a learning rate and a weight decay. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed.bucket_layout import BufferKey


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Flat buffers that are stepped with the same settings."""

    buffers: tuple[int, ...]
    """Numbers of the flat buffers."""
    wd_mult: float
    """The scheduled weight decay is multiplied by this: 1, or 0 for biases and norms."""
    lr_mult: float = 1.0
    """The scheduled learning rate is multiplied by this."""


def plan_param_groups(keys: Sequence[BufferKey]) -> tuple[ParamGroup, ...]:
    """Group flat buffers into those that decay and those that do not; empty groups are left out.

    Of no buffers, on a pipeline rank without parameters, one empty group is made: it has the rates.

    Args:
        keys: What each flat buffer holds, by its number.
    """
    groups = []
    for decays in (True, False):
        buffers = tuple(number for number, key in enumerate(keys) if key.decays == decays)
        if buffers or (decays and not keys):
            groups.append(ParamGroup(buffers=buffers, wd_mult=1.0 if decays else 0.0))
    return tuple(groups)
