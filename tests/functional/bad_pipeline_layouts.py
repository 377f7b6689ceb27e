"""Pipelines, overlap and ZeRO-3 that cannot be; see ``bad_layouts``."""

from tests.functional.bad_layouts import DEEPSEEK, GOOD, MOE, BadLayout

DEEP = GOOD.replace("--num-layers 4", "--num-layers 8")
PP4 = f"{DEEP} --pipeline-model-parallel-size 4"
LAYOUT = "--pipeline-model-parallel-layout"
BALANCED = f"; or as asked with {LAYOUT} auto"
ONLY_BALANCED = f"legal: as asked with {LAYOUT} auto"

PIPELINES: dict[str, BadLayout] = {
    "stages of the world": BadLayout(
        8,
        f"{DEEP} --pipeline-model-parallel-size 3",
        (
            "--pipeline-model-parallel-size 3 does not divide the world size 8",
            "--num-layers 8 must be a multiple of --pipeline-model-parallel-size 3 x 1",
        ),
        "PP 4 DP 2; PP 2 DP 4; PP 8 DP 1",
    ),
    "more stages than ranks": BadLayout(
        4,
        f"{DEEP} --pipeline-model-parallel-size 8",
        ("--pipeline-model-parallel-size 8 does not divide the world size 4",),
        "PP 4 DP 1; PP 2 DP 2; PP 1 DP 4; or as asked on 8 ranks",
    ),
    "tp and pp of the world": BadLayout(
        4,
        f"{PP4} --tensor-model-parallel-size 2",
        ("--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 4 = 8 does not divide",),
        "TP 1 PP 4 DP 1; TP 2 PP 2 DP 1; TP 2 PP 1 DP 2; or as asked on 8 ranks",
    ),
    "layers of stages": BadLayout(
        6,
        f"{DEEP} --pipeline-model-parallel-size 6",
        (
            "--num-layers 8 must be a multiple of --pipeline-model-parallel-size 6 x 1 virtual "
            "stages = 6; legal: --num-layers 6 or 12",
        ),
        f"PP 2 DP 3; PP 1 DP 6; CP 2 PP 1 DP 3{BALANCED}",
    ),
    "layers of many stages": BadLayout(
        1024,
        f"{DEEPSEEK} --expert-model-parallel-size 64 --pipeline-model-parallel-size 8",
        ("--num-layers 61 must be a multiple of --pipeline-model-parallel-size 8",),
        f"PP 1 EP 64 DP 1024; .*{BALANCED}",
    ),
    "experts and stages of the world, balanced": BadLayout(
        1024,
        f"{DEEPSEEK} --tensor-model-parallel-size 2 --expert-model-parallel-size 96 "
        f"--pipeline-model-parallel-size 8 {LAYOUT} auto",
        (
            "--expert-model-parallel-size 96 x --tensor-model-parallel-size 2 x "
            "--pipeline-model-parallel-size 8 = 1536 does not divide the world size 1024",
        ),
        "TP 2 PP 8 EP 64 DP 64; TP 2 PP 8 EP 32 DP 64",
    ),
    "layers of virtual stages": BadLayout(
        4,
        f"{PP4} --num-virtual-stages-per-pipeline-rank 4",
        ("--pipeline-model-parallel-size 4 x 4 virtual stages = 16; legal: --num-layers 16",),
        "PP 2 DP 2",
    ),
    "layers of a virtual stage": BadLayout(
        4,
        f"{PP4} --num-layers-per-virtual-pipeline-stage 3",
        ("--num-layers 8 must be a multiple of --pipeline-model-parallel-size 4 x 3 layers = 12",),
        None,
    ),
    "layers of the first stage": BadLayout(
        4,
        f"{PP4} --decoder-first-pipeline-num-layers 3",
        (
            "--decoder-first-pipeline-num-layers 3: the other 5 of --num-layers 8 must go evenly "
            "to the other 3 of --pipeline-model-parallel-size 4 ranks",
        ),
        "PP 2 DP 2",
    ),
    "ends of one stage": BadLayout(
        2,
        f"{DEEP} --decoder-last-pipeline-num-layers 3",
        ("--decoder-last-pipeline-num-layers 3 has no effect with --pipeline-model-parallel-size",),
        "PP 2 DP 1",
    ),
    "two splits": BadLayout(
        4,
        f"{PP4} --decoder-first-pipeline-num-layers 2 {LAYOUT} Ett|tt|tt|ttL",
        (f"{LAYOUT} and --decoder-first-pipeline-num-layers exclude each other",),
        None,
    ),
    "stages of a layout": BadLayout(
        4,
        f"{PP4} {LAYOUT} Ett|ttt|tttL",
        ("has 3 stages, no multiple of --pipeline-model-parallel-size 4", ONLY_BALANCED),
        None,
    ),
    "layers of a layout": BadLayout(
        4,
        f"{PP4} {LAYOUT} Ettt|ttt|ttt|L",
        ("has 9 t, but --num-layers is 8", ONLY_BALANCED),
        None,
    ),
    "letters of a layout": BadLayout(
        4,
        f"{PP4} {LAYOUT} Ettt|ttx|ttt|L",
        ("'x' at character 8: known are E (the embedding), t (a transformer layer)", ONLY_BALANCED),
        None,
    ),
    "groups of microbatches": BadLayout(
        4,
        f"{PP4} --num-virtual-stages-per-pipeline-rank 2 "
        "--microbatch-group-size-per-virtual-pipeline-stage 2",
        ("-virtual-pipeline-stage 2 must be at least --pipeline-model-parallel-size 4",),
        "PP 2 DP 2",
    ),
    "experts and stages of the world": BadLayout(
        8,
        f"{PP4} --num-experts 8 --expert-model-parallel-size 4",
        (
            "--expert-model-parallel-size 4 x --pipeline-model-parallel-size 4 = 16 does not "
            "divide the world size 8",
        ),
        "PP 2 EP 4 DP 4; PP 4 EP 2 DP 2; PP 1 EP 4 DP 8; or as asked on 16 ranks",
    ),
    "virtual stages of a schedule": BadLayout(
        4,
        f"{PP4} --pipeline-schedule zb-h1 --num-virtual-stages-per-pipeline-rank 2",
        ("--pipeline-schedule zb-h1 has 1 virtual stage a rank, and the split of layers makes 2",),
        None,
    ),
    "schedule of one stage": BadLayout(
        2,
        f"{DEEP} --pipeline-schedule zb-h1",
        ("--pipeline-schedule zb-h1 has no effect with --pipeline-model-parallel-size 1",),
        "PP 2 DP 1",
    ),
    "query groups that tp neither divides nor repeats": BadLayout(
        6,
        f"{DEEP} --hidden-size 48 --num-attention-heads 12 --group-query-attention "
        "--num-query-groups 4 --tensor-model-parallel-size 6",
        ("--tensor-model-parallel-size 6 must divide --num-query-groups 4 or be a multiple of it",),
        "TP 2 DP 3; TP 1 DP 6",
    ),
    "parameters shared out over stages": BadLayout(
        4,
        f"{DEEP} --use-torch-fsdp2 --pipeline-model-parallel-size 2",
        ("--use-torch-fsdp2 with --pipeline-model-parallel-size 2 is not offered",),
        "PP 1 DP 4",
    ),
    "parameters shared out over slices": BadLayout(
        4,
        f"{MOE} --use-torch-fsdp2 --tensor-model-parallel-size 2",
        ("--use-torch-fsdp2 with --tensor-model-parallel-size 2 is not offered",),
        "TP 1 DP 4",
    ),
    "two ways to share out": BadLayout(
        4,
        f"{DEEP} --use-torch-fsdp2 --use-distributed-optimizer",
        ("--use-torch-fsdp2 and --use-distributed-optimizer exclude each other",),
        None,
    ),
    "trace of stages": BadLayout(
        4,
        f"{PP4} --num-experts 8 --moe-routing-trace-path trace",
        ("--pipeline-model-parallel-size 4 with --moe-routing-trace-path is not offered yet",),
        "PP 1 DP 4",
    ),
    "overlap of experts of one rank": BadLayout(
        2,
        f"{MOE} --overlap-moe-expert-parallel-comm --global-batch-size 8 --micro-batch-size 1",
        ("--overlap-moe-expert-parallel-comm has no effect with --expert-model-parallel-size 1",),
        "EP 2 DP 2",
    ),
    "overlap of one microbatch": BadLayout(
        2,
        f"{MOE} --overlap-moe-expert-parallel-comm --expert-model-parallel-size 2 "
        "--global-batch-size 2 --micro-batch-size 1",
        ("a step has only one: --global-batch-size 2 = --micro-batch-size 1 x 2 data-parallel",),
        "CP 2 EP 2 DP 1",
    ),
}
