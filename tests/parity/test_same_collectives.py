"""R9: ranks of a group issue the same collectives in one order, in training and evaluation.

Stages and layers without experts, microbatches without a token that counts, ranks without tokens.
"""

from typing import Any

import pytest
import torch.distributed as dist

from megatron.training.evaluate import evaluate
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from tests.helpers.collective_log import Issued, assert_ranks_agree, logged_collectives
from tests.helpers.layouts import make_config, make_run, microbatches
from tests.helpers.ranks import run_ranks

BASE: dict[str, Any] = {"num_layers": 4, "num_attention_heads": 4, "optimizer": "sgd"}
EP = {"expert_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "dense first": EP | {"moe_layer_freq": [0, 0, 1, 1]},
    "a stage without experts": EP | PP | {"moe_layer_freq": [0, 0, 1, 1]},
    "a stage without layers": PP
    | {
        "pipeline_model_parallel_layout": "Etttt|L",
        "untie_embeddings_and_output_weights": True,
    },
    "all tokens to one rank": EP | {"moe_router_force_biased": 1000.0},
    "shares of the sequence": EP
    | {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_tensor_parallel_size": 1,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "bucket_size": 700,
    },
    "context": EP | {"context_parallel_size": 2, "seq_length": 12},
}


def _log(options: dict[str, Any]) -> list[Issued]:
    """Return what this rank issues in a step and an evaluation behind it."""
    run = make_run(make_config(**options))
    with logged_collectives() as log:
        train_step(run, TrainState(dropout_seed=1), microbatches(run, 0))
        evaluate(run, microbatches(run, 8), 1)
    return log


def _ranks_agree(options: dict[str, Any]) -> None:
    logs: list[Any] = [None] * dist.get_world_size()
    mine = _log(options)
    dist.all_gather_object(logs, mine)
    assert_ranks_agree(logs)
    assert len(mine) > 5


@pytest.mark.parametrize("case", CASES)
def test_ranks_issue_the_same_collectives_in_one_order(case):
    run_ranks(_ranks_agree, 4, BASE | CASES[case])


def _leaves_one_out(options: dict[str, Any]) -> None:
    logs: list[Any] = [None] * dist.get_world_size()
    mine = _log(options)
    dist.all_gather_object(logs, mine[: -1 if dist.get_rank() == 1 else None])
    with pytest.raises(AssertionError):
        assert_ranks_agree(logs)


def test_a_collective_that_one_rank_leaves_out_is_seen():
    run_ranks(_leaves_one_out, 2, BASE | EP)
