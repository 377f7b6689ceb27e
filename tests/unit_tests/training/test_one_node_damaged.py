"""One node alone cannot read what it kept: every node goes back to the persistent checkpoint."""

from pathlib import Path

import torch.distributed as dist

from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import wrong_keys
from tests.unit_tests.training.test_non_persistent import Node, _flip


def _one_is_damaged(folder: Path) -> None:
    node = Node(folder, "local", sharded=True)
    node.save(1)
    assert node.keep(2).error == ""
    dist.barrier()
    if dist.get_rank() == 1:
        _flip(node.between.folder(node.config.checkpoint.save))
    dist.barrier()
    again = Node(folder, "local", sharded=True)
    assert again.load().iteration == 1
    assert wrong_keys(again.tensors()) == []
    # a node that had read its own would have sent its weights to the others by now
    weights = [param.detach().clone() for param in again.model.module.parameters()]
    again.model.start_param_sync()
    again.model.finish_param_sync()
    for param, weight in zip(again.model.module.parameters(), weights, strict=True):
        assert param.equal(weight)


def test_with_a_sharded_optimizer_no_node_gathers_before_all_have_read(tmp_path: Path) -> None:
    run_ranks(_one_is_damaged, 2, tmp_path)
