"""The process groups of this rank. The only module that calls ``torch.distributed.new_group``."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.parallel_layout import ParallelLayout, rank_groups

_BACKGROUND = "background"

# field of ProcessGroupCollection -> (grid, axes that its ranks differ in)
GROUP_AXES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tp": ("dense", ("tp",)),
    "cp": ("dense", ("cp",)),
    "dp": ("dense", ("dp",)),
    "pp": ("dense", ("pp",)),
    "tp_cp": ("dense", ("tp", "cp")),
    "dp_cp": ("dense", ("dp", "cp")),
    "tp_dp_cp": ("dense", ("tp", "cp", "dp")),
    "mp": ("dense", ("tp", "pp")),
    "world": ("dense", ("tp", "cp", "dp", "pp")),
    "ep": ("expert", ("ep",)),
    "expt_tp": ("expert", ("etp",)),
    "expt_dp": ("expert", ("edp",)),
    "tp_ep": ("expert", ("etp", "ep")),
    "tp_ep_pp": ("expert", ("etp", "ep", "pp")),
    "ep_node": ("nodes", ("ep_node",)),
    "ep_across": ("nodes", ("ep_across",)),
}


def rank_lists(layout: ParallelLayout) -> dict[str, list[list[int]]]:
    """Return the ranks of every group of a layout, by field of ``ProcessGroupCollection``."""
    grids = {
        "dense": layout.dense_grid(),
        "expert": layout.expert_grid(),
        "nodes": layout.node_grid(),
    }
    lists = {name: rank_groups(grids[grid], axes) for name, (grid, axes) in GROUP_AXES.items()}
    return lists | {"dp_cp_ends": layout.end_groups()}


def background_group(timeout: timedelta | None = None) -> ProcessGroup:
    """Make a group of all ranks for plain objects, used by another thread than the one that trains.

    It is gloo's whatever the devices: nothing on a GPU waits for it. Every rank must call this.

    Args:
        timeout: Of every message; torch's default when None.
    """
    return dist.new_group(backend="gloo", timeout=timeout, group_desc=_BACKGROUND)


def is_background(group: ProcessGroup | None) -> bool:
    """Tell whether ``background_group`` made ``group``: its order is not that of training."""
    return group is not None and bool(group.group_desc == _BACKGROUND)


def node_group(first_rank: int, timeout: timedelta | None = None) -> ProcessGroup:
    """Make the group of the ranks of this rank's node, for plain objects; every rank calls this.

    Args:
        first_rank: The first rank of this node, which tells nodes apart.
        timeout: Of every message; torch's default when None.
    """
    firsts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(firsts, first_rank)
    nodes = [[r for r, other in enumerate(firsts) if other == f] for f in sorted(set(firsts))]
    groups = dist.new_subgroups_by_enumeration(
        nodes, backend="gloo", timeout=timeout, group_desc="node"
    )
    group: ProcessGroup = groups[0]
    return group


@dataclass(frozen=True, kw_only=True)
class ProcessGroupCollection:
    """The groups this rank belongs to; modules take it as ``pg_collection``."""

    tp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    pp: ProcessGroup
    tp_cp: ProcessGroup
    dp_cp: ProcessGroup
    tp_dp_cp: ProcessGroup
    mp: ProcessGroup
    world: ProcessGroup
    ep: ProcessGroup
    expt_tp: ProcessGroup
    expt_dp: ProcessGroup
    tp_ep: ProcessGroup
    tp_ep_pp: ProcessGroup
    ep_node: ProcessGroup
    ep_across: ProcessGroup
    dp_cp_ends: ProcessGroup
    """``dp_cp`` of the first and the last pipeline rank together; on others it is ``dp_cp``."""

    @classmethod
    def create(
        cls, layout: ParallelLayout, timeout: timedelta | None = None
    ) -> "ProcessGroupCollection":
        """Create all groups. Every rank must call this, at the same point.

        Axes with equal rank lists share one group, so a run makes no more communicators
        than it needs.

        Args:
            layout: Sizes of the axes; ``layout.world_size`` equals that of the default group.
            timeout: Of every collective in these groups; torch's default when None.
        """
        cache: dict[tuple[tuple[int, ...], ...], ProcessGroup] = {}
        groups = {}
        for name, ranks in rank_lists(layout).items():
            key = tuple(map(tuple, ranks))
            if key not in cache:
                cache[key] = dist.new_subgroups_by_enumeration(
                    ranks, timeout=timeout, group_desc=name
                )[0]
            groups[name] = cache[key]
        return cls(**groups)
