import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.tensor_parallel.query_groups import _Copies, plan_exchange


@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.integers(1, 5))
def test_every_rank_gets_its_heads_and_the_key_and_value_of_its_group(groups, mates, each, half):
    heads, head_dim, ranks = mates * each, half * mates, groups * mates
    rows = torch.arange(groups * (heads + 2) * head_dim)
    slices = rows.chunk(ranks)
    plans = [plan_exchange(heads, head_dim, mates, rank, ranks) for rank in range(ranks)]
    sent = []
    for rank, plan in enumerate(plans):
        whole = torch.cat([slices[rank][start:end] for start, end in plan.blocks])
        sent.append(whole.split(plan.splits.send))
    for rank, plan in enumerate(plans):
        parts = [sent[other][rank] for other in range(ranks)]
        assert [len(part) for part in parts] == plan.splits.recv
        group = rows.chunk(groups)[rank // mates]
        own = group[: heads * head_dim].chunk(mates)[rank % mates]
        want = torch.cat([own, group[heads * head_dim :]])
        assert torch.equal(torch.cat(parts), want)


def test_copies_add_up_their_gradients_and_narrow_ones_in_fp32():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: _Copies.apply(y, [(0, 3), (2, 6), (2, 6)]), x)
    narrow = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    copies = _Copies.apply(narrow, [(0, 1)] * 3)
    copies.backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert narrow.grad.item() == 258.0, "256 + 1 is 256 in bf16"
