"""The planners of torch.distributed.checkpoint (DCP), as our checkpoints need them.

DCP loads 700 modules in 0.6 s, so this file is imported by the first save or load, not at start.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from megatron.core.dist_checkpointing.tensor_shards import TensorShards


class SavePlanner(DefaultSavePlanner):
    """Balances by what is really written."""

    def __init__(self, dedup: Callable[[list[SavePlan]], list[SavePlan]]) -> None:
        """Take ``dedup``, which leaves each block to one of the ranks that offer it."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._keep_one = dedup

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        return self._keep_one(all_plans)


class LoadPlanner(DefaultLoadPlanner):
    """Finds blocks too."""

    def __init__(self) -> None:
        """Take names and tensors as they are."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """See DefaultLoadPlanner, which looks for tensors on the meta device and loses blocks."""
        super().set_up_planner({}, metadata, is_coordinator)
        self.state_dict = self.original_state_dict = state_dict

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """See DefaultLoadPlanner."""
        found = self.state_dict[index.fqn]
        return found.block_at(index.offset) if isinstance(found, TensorShards) else found
