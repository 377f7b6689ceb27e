"""I and W give the bits of B on several ranks: backward's collectives in I, sums after W."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.layouts import VOCAB, make_config, make_run
from tests.helpers.ranks import run_ranks
from tests.helpers.two_steps import ORDERS, gradients

SEQ = 12
DENSE: dict[str, Any] = {
    "num_moe_experts": None,
    "moe_aux_loss_coeff": None,
    "moe_z_loss_coeff": None,
    "num_attention_heads": 4,
}
TP, SP = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp": (2, DENSE | TP),
    "sp": (2, DENSE | TP | SP | {"untie_embeddings_and_output_weights": True}),
    "latent_attention": (
        2,
        DENSE
        | TP
        | SP
        | {
            "multi_latent_attention": True,
            "q_lora_rank": 10,
            "kv_lora_rank": 8,
            "qk_head_dim": 4,
            "qk_pos_emb_head_dim": 2,
            "v_head_dim": 5,
            "position_embedding_type": "rope",
            "recompute_granularity": "selective",
            "recompute_modules": ["mla_up_proj"],
        },
    ),
    "cp": (2, DENSE | {"context_parallel_size": 2, "cp_comm_type": ["p2p"]}),
    "ep_sharded": (2, {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}),
    "ep_recompute": (
        2,
        {
            "expert_model_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "tp_ep_shared": (
        4,
        TP
        | SP
        | {
            "expert_model_parallel_size": 2,
            "moe_shared_expert_intermediate_size": 20,
            "moe_shared_expert_overlap": True,
        },
    ),
}


def _batch(number: int) -> tuple[Tensor, ...]:
    """Microbatch ``number`` of this data rank; with context parallelism this rank's positions."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(VOCAB, (2, SEQ + 1), generator=generator)
    return ids[:, :-1].contiguous(), torch.arange(SEQ).expand(2, -1), ids[:, 1:].contiguous()


def _compare(options: dict[str, Any]) -> None:
    run = make_run(make_config(overlap_grad_reduce=True, bucket_size=700, **options))
    groups = run.world.pg_collection
    cp, data_rank = groups.cp.size(), groups.dp.rank()
    batches = []
    for number in range(3):
        ids, places, labels = _batch(3 * data_rank + number)
        if cp > 1:  # any part will do: what is compared is two ways to the same sums
            ids, places, labels = (x.chunk(cp, 1)[groups.cp.rank()] for x in (ids, places, labels))
        batches.append((ids, places, labels))
    want = gradients(run.model, batches, ORDERS["whole"])
    for name in ("at_once", "late", "last_before_others"):
        got = gradients(run.model, batches, ORDERS[name])
        for key, gradient in want.items():
            assert torch.equal(got[key], gradient), f"rank {dist.get_rank()}, {name}: {key}"
    assert all(gradient.any() for gradient in want.values())


@pytest.mark.parametrize("case", CASES)
def test_two_steps_give_the_bits_of_one_on_several_ranks(case):
    world_size, options = CASES[case]
    run_ranks(_compare, world_size, options)
