import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.transformer.tokens_ahead import LABEL, POSITION, TOKEN, look_ahead


@given(st.data())
def test_each_depth_reads_what_is_so_far_ahead_in_the_same_document(data: st.DataObject) -> None:
    length, depths = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    begins = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    told = data.draw(st.sampled_from(["positions", "mask", "both", "nothing"]))
    seed = data.draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 50, (length + 1,), generator=generator)
    loss_mask = torch.randint(2, (length,), generator=generator).float()
    document = torch.tensor([sum(begins[1 : i + 1]) for i in range(length)])
    places = torch.arange(length)
    if told in ("positions", "both"):
        first = torch.tensor([document.tolist().index(d) for d in document.tolist()])
        places = places - first
    closed = None
    if told in ("mask", "both"):
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        closed = (causal | (document[:, None] != document[None, :]))[None, None]

    ahead = look_ahead(
        text[None, :-1], places[None], text[None, 1:], loss_mask[None], closed, depths=depths
    )

    for depth in range(depths):
        for i in range(length):
            ids, there = ahead.ids[0, i, depth], i + depth + 1
            if there >= length:
                assert ids.tolist() == [0, 0, 0]
                assert ahead.mask[0, i, depth] == 0
                continue
            assert ids[TOKEN] == text[there]
            assert ids[POSITION] == places[there]
            assert ids[LABEL] == text[there + 1]
            same = told == "nothing" or document[i] == document[there]
            assert ahead.mask[0, i, depth] == (loss_mask[there] if same else 0)
