"""Mistakes in the norms of queries and keys, and in rotary positions."""

_GOOD = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --mock-data"
_ROPE = f"{_GOOD} --position-embedding-type rope"

# name -> (world size, command line, what the message must say)
ATTENTION_CASES: dict[str, tuple[int, str, list[str]]] = {
    "norm of all heads of nothing": (
        1,
        f"{_GOOD} --qk-layernorm-scope all_heads --apply-wd-to-qk-layernorm",
        ["all_heads needs --qk-layernorm", "--apply-wd-to-qk-layernorm needs --qk-layernorm"],
    ),
    "norm of all heads with a mean": (
        1,
        f"{_GOOD} --qk-layernorm --qk-layernorm-scope all_heads",
        ["all_heads with --normalization LayerNorm is not offered", "or --qk-layernorm-scope head"],
    ),
    "interleaved nothing": (
        1,
        f"{_GOOD} --rotary-interleaved --rotary-base 500",
        ["--rotary-base 500, --rotary-interleaved have no effect without --position-embedding-ty"],
    ),
    "two ways to stretch": (
        1,
        f"{_ROPE} --use-rope-scaling --rope-scaling-type yarn --rope-scaling-factor 4",
        ["--use-rope-scaling and --rope-scaling-type yarn stretch rotary positions in different"],
    ),
    "yarn that is plain": (
        1,
        f"{_GOOD} --position-embedding-type yarn --rope-type rope --rope-scaling-factor 4",
        ["--rope-type rope contradicts --position-embedding-type yarn; leave one out"],
    ),
    "linear twice": (
        1,
        f"{_ROPE} --rotary-seq-len-interpolation-factor 2 --rope-scaling-type linear",
        ["--rotary-seq-len-interpolation-factor 2 and --rope-scaling-type linear both stretch"],
    ),
    "yarn by nothing": (
        1,
        f"{_ROPE} --rope-type yarn --yarn-beta-fast 1 --yarn-beta-slow 2 --rotary-base 0.5",
        [
            "--rope-type yarn needs --rope-scaling-factor, the longest length over the original",
            "--yarn-beta-fast 1 must be above --yarn-beta-slow 2",
            "--rope-type yarn needs a --rotary-base above 1, not 0.5",
        ],
    ),
    "llama3 without a ramp": (
        1,
        f"{_ROPE} --use-rope-scaling --rope-scaling-low-freq-factor 4",
        ["--rope-scaling-high-freq-factor 4 must be above --rope-scaling-low-freq-factor 4"],
    ),
    "ntk of one pair": (
        1,
        f"{_ROPE} --rope-scaling-type ntk --rope-scaling-factor 2 --rotary-percent 0.125",
        ["--rope-scaling-type ntk needs more than the 2 channels of a head that are rotated"],
    ),
    "longrope of nothing": (
        1,
        f"{_ROPE} --rope-scaling-type longrope --longrope-short-factor 1 2 3",
        [
            "longrope needs --rope-scaling-original-max-position-embeddings",
            "longrope needs --longrope-long-factor, a number for each frequency",
            "--longrope-short-factor has 3 numbers; one for each pair of the 16 channels of a head",
        ],
    ),
    "longrope of zeros": (
        1,
        f"{_ROPE} --rope-scaling-type longrope --longrope-short-factor 0 1 --rotary-percent 0.25 "
        "--longrope-long-factor 2 2 --rope-scaling-original-max-position-embeddings 64",
        ["--longrope-short-factor 0.0 1.0 must be above 0"],
    ),
    "dynamic ntk": (
        1,
        f"{_ROPE} --rope-scaling-type dynamic --rope-scaling-factor 2",
        ["--rope-scaling-type dynamic: must be one of none, linear, ntk", "dynamic NTK turns"],
    ),
    "numbers of other kinds": (
        1,
        f"{_ROPE} --rope-scaling-type linear --rope-scaling-factor 2 --mscale 0.7 "
        "--rope-attention-factor 2 --rope-scaling-high-freq-factor 8",
        [
            "--mscale 0.7 has no effect without --rope-scaling-type yarn",
            "--rope-attention-factor 2 has no effect without --rope-scaling-type yarn or longrope",
            "--rope-scaling-high-freq-factor 8 has no effect without --rope-scaling-type llama3",
        ],
    ),
    "two factors": (
        1,
        f"{_ROPE} --rotary-seq-len-interpolation-factor 2 --rotary-scaling-factor 4",
        ["--rope-scaling-factor 4 has no effect with --rotary-seq-len-interpolation-factor 2"],
    ),
    "stretched shorter": (
        1,
        f"{_ROPE} --rope-scaling-type linear --rope-scaling-factor 0.5",
        ["--rope-scaling-factor 0.5 must be at least 1"],
    ),
    "stretched table": (
        1,
        f"{_GOOD} --use-rope-scaling --yarn-beta-fast 3",
        ["--use-rope-scaling, --yarn-beta-fast 3 have no effect without --position-embedding-type"],
    ),
}
