"""What users get wrong about context parallelism; see ``bad_input``."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
MOE = f"{GOOD} --num-experts 8"

# name -> (world size, command line, what the message must say)
CONTEXT_CASES: dict[str, tuple[int, str, list[str]]] = {
    "context parallel length": (
        2,
        f"{GOOD} --num-attention-heads 4 --context-parallel-size 2 --seq-length 62",
        ["--seq-length 62 must be a multiple of 4, such as 60 or 64"],
    ),
    "context parallel length in shares": (
        4,
        f"{GOOD} --num-attention-heads 4 --context-parallel-size 2 --seq-length 4 "
        "--tensor-model-parallel-size 4 --sequence-parallel",
        ["--context-parallel-size 2 = 8 does not divide the world", "must be a multiple of 8"],
    ),
    "context parallel world": (
        3,
        f"{GOOD} --context-parallel-size 2",
        ["--context-parallel-size 2 does not divide the world size 3"],
    ),
    "context parallel below 1": (1, f"{GOOD} --context-parallel-size 0", ["must be at least 1"]),
    "context parallel batch": (
        4,
        f"{GOOD} --context-parallel-size 2 --micro-batch-size 2 --global-batch-size 6",
        ["global-batch-size 6"],
    ),
    "heads of a2a": (
        4,
        f"{GOOD} --num-attention-heads 2 --context-parallel-size 2 --cp-comm-type a2a "
        "--tensor-model-parallel-size 2",
        ["--num-attention-heads 2 / --tensor-model-parallel-size 2 = 1 heads over", "use p2p"],
    ),
    "groups of a2a": (
        2,
        f"{GOOD} --num-attention-heads 6 --kv-channels 8 --context-parallel-size 2 "
        "--cp-comm-type a2a --group-query-attention --num-query-groups 3",
        ["--num-query-groups 3 = 3 groups over --context-parallel-size 2", "use p2p or all_gather"],
    ),
    "ways of layers": (
        2,
        f"{GOOD} --context-parallel-size 2 --cp-comm-type p2p a2a",
        ["--cp-comm-type has 2 entries", "each of --num-layers 4"],
    ),
    "two ways at once": (
        2,
        f"{GOOD} --context-parallel-size 2 --cp-comm-type a2a+p2p",
        ["a2a+p2p", "p2p, all_gather, a2a", "one way a layer"],
    ),
    "ways of one rank": (
        1,
        f"{GOOD} --cp-comm-type a2a",
        ["--cp-comm-type a2a has no effect with --context-parallel-size 1"],
    ),
    "trace of slices": (
        2,
        f"{MOE} --context-parallel-size 2 --moe-router-load-balancing-type none "
        "--moe-routing-trace-path trace",
        ["--moe-routing-trace-path is not offered yet"],
    ),
    "replay of a share": (
        2,
        f"{MOE} --context-parallel-size 2 --moe-enable-routing-replay",
        ["--moe-enable-routing-replay with --context-parallel-size 2 is not offered"],
    ),
}
