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
}
