"""Plain pipelines: what a schedule must do, written without the project's own notion of needs."""


def stages_of_ranks(pp: int, chunks: int, v_shape: bool) -> list[list[int]]:
    """List the stages of each rank, chunk by chunk: round and round, or there and back."""
    ranks = [[] for _ in range(pp)]
    for stage in range(pp * chunks):
        lap, place = divmod(stage, pp)
        ranks[pp - 1 - place if v_shape and lap % 2 else place].append(stage)
    return ranks


def play(lists, stages, num_microbatches: int) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Walk all lists, one action of any rank at a time, and note in which order things happened.

    Args:
        lists: For each rank its (kind, microbatch, chunk) in order.
        stages: For each rank its stages, chunk by chunk.

    Returns:
        (kind, microbatch, stage) -> (when, which rank); steps that could never run are missing.
    """
    done: dict[tuple[str, int, int], tuple[int, int]] = {}
    last = sum(map(len, stages)) - 1
    todo = [list(reversed(own)) for own in lists]
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(todo):
            if not own:
                continue
            kind, batch, chunk = own[-1]
            assert 0 <= batch < num_microbatches
            stage = stages[rank][chunk]
            if kind == "F":
                ready = stage == 0 or ("F", batch, stage - 1) in done
            elif kind == "W":
                ready = ("I", batch, stage) in done
            else:
                after = stage == last or any((k, batch, stage + 1) in done for k in "BI")
                ready = ("F", batch, stage) in done and after
            if ready:
                own.pop()
                assert (kind, batch, stage) not in done, "done twice"
                done[kind, batch, stage] = (len(done), rank)
                moved = True
    return done


def does_everything_once(done, num_stages: int, num_microbatches: int) -> bool:
    """Whether each microbatch went forward once and back once, whole or in two, at each stage."""
    for batch in range(num_microbatches):
        for stage in range(num_stages):
            kinds = sorted(kind for kind in "FBIW" if (kind, batch, stage) in done)
            if kinds not in (["B", "F"], ["F", "I", "W"]):
                return False
    return True


def most_kept(own) -> int:
    """Count the microbatches of a chunk that went forward and are not through, at most."""
    kept, most = set(), 0
    for kind, batch, chunk in own:
        if kind == "F":
            kept.add((batch, chunk))
        elif kind in "BW":
            kept.remove((batch, chunk))
        most = max(most, len(kept))
    assert not kept, "something is kept for ever"
    return most
