"""The table of layouts that cannot be: command lines, what is said of them, and what is offered.

What is offered is not only compared: each layout is put back into the command line and accepted.
"""

from typing import NamedTuple

GOOD = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --mock-data"
MOE = f"{GOOD} --num-experts 8"
DEEPSEEK = (
    "--num-layers 61 --hidden-size 7168 --num-attention-heads 128 --mock-data --num-experts 256 "
    "--moe-layer-freq ([0]*3+[1]*58) --moe-router-topk 8 --ffn-hidden-size 18432 "
    "--moe-ffn-hidden-size 2048"
)


class BadLayout(NamedTuple):
    """One mistake: formula and numbers that the message holds, and the layouts it offers."""

    world_size: int
    line: str
    says: tuple[str, ...]
    offers: str | None
    """What follows ``nearest legal layouts on N ranks: ``; None where no layout mends it."""


LAYOUTS: dict[str, BadLayout] = {
    "tp of the world": BadLayout(
        6,
        f"{GOOD} --tensor-model-parallel-size 4",
        ("--tensor-model-parallel-size 4 does not divide the world size 6",),
        "TP 2 DP 3; TP 1 DP 6; TP 1 CP 2 DP 3; or as asked on 8 ranks",
    ),
    "no torchrun": BadLayout(
        1,
        f"{GOOD} --tensor-model-parallel-size 2",
        ("--tensor-model-parallel-size 2 does not divide the world size 1 (ranks of torchrun)",),
        "TP 1 DP 1; or as asked on 2 ranks",
    ),
    "tp and cp of the world": BadLayout(
        4,
        f"{GOOD} --tensor-model-parallel-size 4 --context-parallel-size 2",
        (
            "--tensor-model-parallel-size 4 x --context-parallel-size 2 = 8 does not divide the "
            "world size 4",
        ),
        "TP 2 CP 2 DP 1",
    ),
    "cp of the world": BadLayout(
        3,
        f"{GOOD} --context-parallel-size 2",
        ("--context-parallel-size 2 does not divide the world size 3",),
        "CP 1 DP 3",
    ),
    "heads": BadLayout(
        4,
        f"{GOOD} --num-attention-heads 2 --tensor-model-parallel-size 4",
        ("--tensor-model-parallel-size 4 must divide --num-attention-heads 2",),
        "TP 2 DP 2; TP 1 DP 4",
    ),
    "heads of the hidden size": BadLayout(
        2,
        f"{GOOD} --num-attention-heads 5",
        ("--hidden-size 64 must be a multiple of --num-attention-heads 5",),
        None,
    ),
    "query groups": BadLayout(
        4,
        "--num-layers 4 --hidden-size 192 --num-attention-heads 12 --mock-data "
        "--group-query-attention --num-query-groups 6 --tensor-model-parallel-size 4",
        (
            "--tensor-model-parallel-size 4 must divide --num-query-groups 6 or be a multiple",
            "sizes that fit: 2, 3, 6",
        ),
        "TP 2 DP 2; TP 1 DP 4; TP 2 CP 2 DP 1",
    ),
    "query groups of the heads": BadLayout(
        1,
        f"{GOOD} --group-query-attention --num-query-groups 3",
        ("--num-query-groups 3 must divide --num-attention-heads 4",),
        None,
    ),
    "vocabulary": BadLayout(
        2,
        f"{GOOD} --padded-vocab-size 50257 --tensor-model-parallel-size 2",
        ("--tensor-model-parallel-size 2 must divide the padded vocabulary 50257",),
        "TP 1 DP 2; TP 1 CP 2 DP 1",
    ),
    "ffn": BadLayout(
        4,
        f"{GOOD} --ffn-hidden-size 102 --tensor-model-parallel-size 4",
        ("--tensor-model-parallel-size 4 must divide --ffn-hidden-size 102; sizes that fit: 2, 3",),
        "TP 2 DP 2; TP 1 DP 4",
    ),
    "ffn of shared experts": BadLayout(
        2,
        f"{MOE} --moe-shared-expert-intermediate-size 33 --tensor-model-parallel-size 2",
        ("must divide --moe-shared-expert-intermediate-size 33",),
        "TP 1 DP 2",
    ),
    "ffn of experts": BadLayout(
        4,
        f"{MOE} --moe-ffn-hidden-size 66 --expert-tensor-parallel-size 4",
        ("--expert-tensor-parallel-size 4 must divide the ffn size of an expert, 66",),
        "ETP 2 DP 4; ETP 1 DP 4; EP 2 ETP 2 DP 4",
    ),
    "ffn of experts, sliced as tensor parallelism is": BadLayout(
        4,
        f"{MOE} --moe-ffn-hidden-size 66 --tensor-model-parallel-size 4",
        ("--expert-tensor-parallel-size 4 must divide the ffn size of an expert, 66",),
        "TP 2 DP 2",
    ),
    "sequence over cp": BadLayout(
        4,
        f"{GOOD} --seq-length 36 --context-parallel-size 4",
        ("--seq-length 36 must be a multiple of 8, such as 32 or 40",),
        "CP 2 DP 2; CP 1 DP 4",
    ),
    "sequence over cp and shares": BadLayout(
        8,
        f"{GOOD} --seq-length 36 --context-parallel-size 2 --tensor-model-parallel-size 4 "
        "--sequence-parallel",
        ("--context-parallel-size 2 with --tensor-model-parallel-size 4", "multiple of 8"),
        "TP 2 CP 2 DP 2; TP 4 CP 1 DP 2; TP 1 CP 2 DP 4",
    ),
    "sequence over shares": BadLayout(
        2,
        f"{GOOD} --seq-length 63 --tensor-model-parallel-size 2 --sequence-parallel",
        ("--sequence-parallel shares --seq-length 63 over --tensor-model-parallel-size 2",),
        "TP 1 DP 2",
    ),
    "sequence over shares of MoE layers": BadLayout(
        4,
        f"{MOE} --seq-length 62 --tensor-model-parallel-size 4",
        ("MoE layers share --seq-length 62 over --tensor-model-parallel-size 4",),
        "TP 2 DP 2; TP 1 DP 4",
    ),
    "experts over ep": BadLayout(
        4,
        f"{MOE} --expert-model-parallel-size 3",
        ("--expert-model-parallel-size 3 does not divide --num-experts 8 nor the world size 4",),
        "EP 4 DP 4; EP 2 DP 4; EP 1 DP 4",
    ),
    "experts over ep that fits the world": BadLayout(
        6,
        f"{MOE} --expert-model-parallel-size 6",
        ("--expert-model-parallel-size 6 does not divide --num-experts 8",),
        "EP 2 DP 6; EP 1 DP 6; CP 2 EP 2 DP 3",
    ),
    "ep of the world": BadLayout(
        2,
        f"{MOE} --expert-model-parallel-size 4",
        ("--expert-model-parallel-size 4 does not divide the world size 2",),
        "EP 2 DP 2; EP 1 DP 2",
    ),
    "ep and slices of the world": BadLayout(
        8,
        f"{MOE} --expert-model-parallel-size 8 --expert-tensor-parallel-size 2",
        (
            "--expert-model-parallel-size 8 x --expert-tensor-parallel-size 2 = 16 does not divide "
            "the world size 8",
        ),
        "EP 4 ETP 2 DP 8; EP 8 ETP 1 DP 8; EP 2 ETP 2 DP 8; or as asked on 16 ranks",
    ),
    "ep and tp of the world": BadLayout(
        8,
        f"{MOE} --expert-model-parallel-size 4 --tensor-model-parallel-size 4",
        (
            "--expert-model-parallel-size 4 x --tensor-model-parallel-size 4 = 16 does not divide "
            "the world size 8",
        ),
        "TP 2 EP 4 DP 4; TP 4 EP 2 DP 2; TP 4 EP 4 ETP 2 DP 2; or as asked on 16 ranks",
    ),
    "experts that differ by layer": BadLayout(
        4,
        f"{GOOD} --moe-num-experts-per-layer ([2,8,8,8]) --moe-router-topk 1 "
        "--expert-model-parallel-size 4",
        ("--expert-model-parallel-size 4 does not divide --moe-num-experts-per-layer [2,8,8,8]",),
        "EP 2 DP 4; EP 1 DP 4",
    ),
    "ep without experts": BadLayout(
        2,
        f"{GOOD} --expert-model-parallel-size 2",
        ("--expert-model-parallel-size 2 needs --num-experts",),
        "EP 1 DP 2",
    ),
    "slices without experts": BadLayout(
        2,
        f"{GOOD} --expert-tensor-parallel-size 2",
        ("--expert-tensor-parallel-size 2 needs --num-experts",),
        "without ETP DP 2",
    ),
    "number of experts": BadLayout(
        4,
        f"{GOOD} --num-experts 6 --expert-model-parallel-size 4",
        ("--expert-model-parallel-size 4 does not divide --num-experts 6",),
        "EP 2 DP 4; EP 1 DP 4",
    ),
    "batch": BadLayout(
        4,
        f"{GOOD} --global-batch-size 6 --micro-batch-size 1",
        ("--global-batch-size 6 must be a multiple of --micro-batch-size 1 x 4 data-parallel",),
        "CP 2 DP 2; PP 2 DP 2; TP 2 DP 2",
    ),
    "batch of groups": BadLayout(
        4,
        f"{GOOD} --tensor-model-parallel-size 2 --global-batch-size 6 --micro-batch-size 2",
        ("--global-batch-size 6 must be a multiple of --micro-batch-size 2 x 2 data-parallel",),
        "TP 2 CP 2 DP 1; TP 2 PP 2 DP 1; TP 4 DP 1; or as asked on 6 ranks",
    ),
    "batch of no layout": BadLayout(
        3,
        f"{GOOD} --global-batch-size 4 --micro-batch-size 1",
        (
            "multiple of --micro-batch-size 1 x 3 data-parallel ranks (= 3); nearest: 3 or 6",
            "no sizes on 3 ranks are legal with the other flags; legal: as asked on 4 ranks",
        ),
        None,
    ),
    "nodes": BadLayout(
        8,
        f"{MOE} --expert-model-parallel-size 4 --expert-tensor-parallel-size 2 "
        "--moe-dispatcher-node-size 3 --moe-token-dispatcher-type alltoall_hierarchical",
        ("--moe-dispatcher-node-size 3 must divide, or be a multiple of", "size 2 = 8"),
        "EP 1 ETP 1 DP 8",
    ),
    "a2a over heads": BadLayout(
        4,
        f"{GOOD} --num-attention-heads 2 --context-parallel-size 2 --cp-comm-type a2a "
        "--tensor-model-parallel-size 2",
        ("--num-attention-heads 2 / --tensor-model-parallel-size 2 = 1 heads over",),
        "TP 1 CP 2 DP 2",
    ),
    "a2a over query groups": BadLayout(
        6,
        f"{GOOD} --num-attention-heads 6 --kv-channels 8 --group-query-attention "
        "--num-query-groups 3 --context-parallel-size 2 --cp-comm-type a2a",
        ("--num-query-groups 3 = 3 groups over --context-parallel-size 2",),
        None,
    ),
    "ways of layers": BadLayout(
        2,
        f"{GOOD} --context-parallel-size 2 --cp-comm-type p2p a2a",
        (
            "--cp-comm-type has 2 entries; give one for all layers",
            "or one for each of --num-layers 4",
        ),
        None,
    ),
    "a way to nobody": BadLayout(
        2,
        f"{GOOD} --cp-comm-type a2a",
        ("--cp-comm-type a2a has no effect with --context-parallel-size 1",),
        "CP 2 DP 1",
    ),
    "replay of a share": BadLayout(
        2,
        f"{MOE} --tensor-model-parallel-size 2 --moe-enable-routing-replay",
        ("--moe-enable-routing-replay with --tensor-model-parallel-size 2 is not offered",),
        "TP 1 DP 2",
    ),
    "trace of a share": BadLayout(
        4,
        f"{MOE} --context-parallel-size 2 --moe-routing-trace-path trace",
        ("--context-parallel-size 2 with --moe-routing-trace-path is not offered yet",),
        "CP 1 DP 4",
    ),
    "gather of nothing": BadLayout(
        2,
        f"{GOOD} --overlap-param-gather --overlap-grad-reduce",
        ("--overlap-param-gather needs --use-distributed-optimizer",),
        None,
    ),
    "gather before reductions": BadLayout(
        2,
        f"{GOOD} --overlap-param-gather --use-distributed-optimizer",
        ("--overlap-param-gather needs --overlap-grad-reduce",),
        None,
    ),
    "tp of 0": BadLayout(
        4,
        f"{GOOD} --tensor-model-parallel-size 0",
        ("--tensor-model-parallel-size 0 must be at least 1",),
        "TP 1 DP 4; TP 2 DP 2; TP 4 DP 1",
    ),
    "cp below 0": BadLayout(
        2,
        f"{GOOD} --context-parallel-size -2",
        ("--context-parallel-size -2 must be at least 1",),
        "CP 1 DP 2; CP 2 DP 1",
    ),
    "ep of 0": BadLayout(
        2,
        f"{MOE} --expert-model-parallel-size 0",
        ("--expert-model-parallel-size 0 must be at least 1",),
        "EP 1 DP 2; EP 2 DP 2",
    ),
    "slices below 0": BadLayout(
        2,
        f"{MOE} --expert-tensor-parallel-size -1",
        ("--expert-tensor-parallel-size -1 must be at least 1",),
        "ETP 1 DP 2; ETP 2 DP 2",
    ),
    "pp of 0": BadLayout(
        2,
        f"{MOE} --pipeline-model-parallel-size 0 --expert-model-parallel-size 2",
        ("--pipeline-model-parallel-size 0 must be at least 1",),
        "PP 1 EP 2 DP 2",
    ),
    "batch of 0": BadLayout(
        2, f"{GOOD} --micro-batch-size 0", ("--micro-batch-size 0 must be at least 1",), None
    ),
    "many ranks": BadLayout(
        1024,
        f"{DEEPSEEK} --tensor-model-parallel-size 2 --expert-model-parallel-size 96",
        ("--expert-model-parallel-size 96 does not divide --num-experts 256",),
        "TP 2 EP 128 DP 512; TP 2 EP 64 DP 512",
    ),
    "another problem beside": BadLayout(
        4,
        f"{MOE} --expert-model-parallel-size 3 --overlap-param-gather --overlap-grad-reduce",
        ("does not divide --num-experts 8", "needs --use-distributed-optimizer"),
        "EP 4 DP 4; EP 2 DP 4; EP 1 DP 4",
    ),
    "everything at once": BadLayout(
        6,
        f"{MOE} --tensor-model-parallel-size 4 --context-parallel-size 4 --seq-length 60 "
        "--expert-model-parallel-size 5 --global-batch-size 7 --micro-batch-size 1",
        (
            "--tensor-model-parallel-size 4 x --context-parallel-size 4 = 16 does not divide the",
            "must be a multiple of 16",
            "--expert-model-parallel-size 5 does not divide --num-experts 8",
            "--expert-model-parallel-size 5 x --tensor-model-parallel-size 4 = 20 does not divide",
        ),
        "",
    ),
}
