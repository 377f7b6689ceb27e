"""The slice of a weight that belongs to this rank of a tensor-parallel group.

The one place where a ``Split`` gets its rank; what follows from it is in param_role.py.
"""

from typing import Literal

from megatron.core.param_role import Split
from megatron.core.process_groups_config import ProcessGroupCollection


def split_over(
    name: Literal["tp", "expt_tp"],
    pg_collection: ProcessGroupCollection,
    *,
    dim: int,
    parts: tuple[int, ...],
    names: tuple[str, ...] = (),
) -> Split:
    """Return this rank's slice of a tensor that is split over group ``name``.

    Args:
        name: Field of ``pg_collection``.
        pg_collection: Of this rank.
        dim: See ``Split``.
        parts: See ``Split``; each a multiple of the size of the group.
        names: See ``Split``.
    """
    group = getattr(pg_collection, name)
    return Split(
        over=name, index=group.rank(), count=group.size(), dim=dim, parts=parts, names=names
    )
