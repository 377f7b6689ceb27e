import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron.core.errors import ConfigError
from megatron.training import rendezvous
from megatron.training.rendezvous import agree_on_start, launcher_keeps_store, store_of_start

LONG, SHORT = timedelta(seconds=60), timedelta(seconds=0.2)


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(store: dist.Store, ranks: Sequence[int], world_size: int) -> list[str]:
    """Let ``ranks`` meet, each a moment after the one before; return the names they agreed on."""
    names: dict[int, str] = {}

    def come(rank: int, late_s: float) -> None:
        time.sleep(late_s)
        names[rank] = agree_on_start(store.clone(), rank, world_size, LONG)

    threads = [threading.Thread(target=come, args=(r, 0.05 * i)) for i, r in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [names[rank] for rank in range(world_size)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_ranks_get_one_name_that_is_new_at_each_start(
    store: dist.Store, order: tuple[int, ...]
) -> None:
    first, second = meet(store, order, 3), meet(store, order, 3)
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_a_start_may_have_fewer_ranks_or_more(store: dist.Store) -> None:
    names = [set(meet(store, range(size), size)) for size in (2, 4, 1, 3)]
    assert [len(found) for found in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_the_word_of_a_rank_that_was_killed_before_it_got_an_answer_is_replaced(
    store: dist.Store,
) -> None:
    """Rank 0 answers it, as it cannot know, and answers its successor when that one comes."""
    store.set(f"{rendezvous._HELLO}/1", "of a process that is gone")
    assert len(set(meet(store, [0, 1], 2))) == 1


def test_an_answer_of_an_earlier_rank_0_is_never_taken(store: dist.Store) -> None:
    old = meet(store, [0, 1], 2)[0]
    with pytest.raises(ConfigError, match="rank 0 did not come within"):
        agree_on_start(store, 1, 2, SHORT)
    assert old not in meet(store, [1, 0], 2)


def test_ranks_that_do_not_come_are_named(store: dist.Store) -> None:
    with pytest.raises(ConfigError, match=r"ranks 1, 2 did not come .*-timeout-minutes 0\.00"):
        agree_on_start(store, 0, 3, SHORT)


def test_a_rank_that_is_known_from_an_earlier_start_only_is_missed_too(store: dist.Store) -> None:
    meet(store, [0, 1], 2)
    with pytest.raises(ConfigError, match="only 1 of 2 ranks came"):
        agree_on_start(store, 0, 2, SHORT)


def test_starts_do_not_see_what_others_wrote(store: dist.Store) -> None:
    store_of_start(store, "a").set("address", "1")
    assert not store_of_start(store, "b").check(["address"])
    assert store_of_start(store, "a").check(["address"])


def test_a_store_of_torchrun_is_told_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert not launcher_keeps_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert launcher_keeps_store()
