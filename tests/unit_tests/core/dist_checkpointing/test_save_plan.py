from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing import save_plan
from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.save_plan import SavePlans
from megatron.core.dist_checkpointing.serialization import read_tensors, write_tensors
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import build, clear, fill, wrong_keys


def _planned_once(folder: str) -> None:
    rounds = 0
    right = save_plan.plan_save

    def counted(*args, **kwargs):
        nonlocal rounds
        rounds += 1
        return right(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_plan, "plan_save", counted)
        plans = SavePlans(dist.group.WORLD)
        ddp, optimizer = build(2, sharded=True)
        tensors = model_tensors(ddp.module) | optimizer_tensors(optimizer.named_state())
        fill(tensors)
        for number in (1, 2):
            path = Path(folder) / str(number)
            path.mkdir(exist_ok=True)
            dist.barrier()
            write_tensors(path, tensors, dist.group.WORLD, plans=plans)
        assert rounds == 1
        clear(tensors)
        read_tensors(path, tensors, dist.group.WORLD, prefixes=("model.", "optimizer."))
        assert wrong_keys(tensors) == []
        if dist.get_rank() == 1:  # one rank alone holds something else
            tensors["model.new"] = torch.ones(3)
        assert "model.new" in {block.key for block in plans.blocks(tensors)} or not dist.get_rank()
        assert rounds == 2


def test_ranks_plan_again_only_when_one_of_them_holds_other_tensors(tmp_path: Path) -> None:
    run_ranks(_planned_once, 2, str(tmp_path))
