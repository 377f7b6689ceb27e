"""What users get wrong about pipeline parallelism; see ``bad_input``."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
MOE = f"{GOOD} --num-experts 8"
PP = "--pipeline-model-parallel-size"

# name -> (world size, command line, what the message must say)
PIPELINE_CASES: dict[str, tuple[int, str, list[str]]] = {
    "layers of stages": (
        3,
        f"{GOOD} {PP} 3",
        [
            "--num-layers 4 must be a multiple of --pipeline-model-parallel-size 3 x 1",
            "legal: --num-layers 3 or 6, --pipeline-model-parallel-size 2 or 4",
        ],
    ),
    "pipeline of world": (
        4,
        f"{GOOD} {PP} 3",
        ["-model-parallel-size 3 does not divide the world size 4", "PP 4 DP 1; PP 2 DP 2"],
    ),
    "pipeline below 1": (1, f"{GOOD} {PP} 0", [f"{PP} 0 must be at least 1"]),
    "experts of a stage": (
        2,
        f"{MOE} {PP} 2 --expert-model-parallel-size 2",
        ["x --pipeline-model-parallel-size 2 = 4 does not divide the world size 2", "on 4 ranks"],
    ),
    "virtual stages": (
        2,
        f"{GOOD} {PP} 2 --num-virtual-stages-per-pipeline-rank 3",
        ["x 3 virtual stages = 6", "--num-layers 6, --num-virtual-stages-per-pipeline-rank 2;"],
    ),
    "two ways to say stages": (
        2,
        f"{GOOD} {PP} 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
        ["exclude each other: one follows from the other"],
    ),
    "stages of one rank": (
        1,
        f"{GOOD} --num-virtual-stages-per-pipeline-rank 2 --decoder-first-pipeline-num-layers 1",
        ["--decoder-first-pipeline-num-layers 1 have no effect with", f"{PP} 1"],
    ),
    "own ends": (
        4,
        f"{GOOD} {PP} 4 --decoder-first-pipeline-num-layers 2",
        ["the other 2 of --num-layers 4 must go evenly", "legal: --decoder-first-pipeline"],
    ),
    "layers of a layout": (
        2,
        f"{GOOD} {PP} 2 --pipeline-model-parallel-layout Ett|tttL",
        ["has 5 t, but --num-layers is 4"],
    ),
    "stages of a layout": (
        2,
        f"{GOOD} {PP} 2 --pipeline-model-parallel-layout Et|tt|tL",
        ["has 3 stages, no multiple of --pipeline-model-parallel-size 2"],
    ),
    "layout of nothing": (
        2,
        f"{GOOD} {PP} 2 --pipeline-model-parallel-layout Et|x",
        ["--pipeline-model-parallel-layout"],
    ),
    "layout cannot be balanced": (
        8,
        f"{GOOD} {PP} 8 --pipeline-model-parallel-layout auto",
        ["8 stages cannot be filled", "at most 6 stages"],
    ),
    "groups of one stage": (
        2,
        f"{GOOD} {PP} 2 --microbatch-group-size-per-virtual-pipeline-stage 4",
        ["has no effect without several virtual stages a rank"],
    ),
    "small groups": (
        4,
        f"{GOOD} {PP} 2 --microbatch-group-size-per-virtual-pipeline-stage 1 "
        "--num-virtual-stages-per-pipeline-rank 2",
        ["-stage 1 must be at least --pipeline-model-parallel-size 2", "needs 2 steps"],
    ),
    "unknown schedule": (
        2,
        f"{GOOD} {PP} 2 --pipeline-schedule gpipe",
        ["gpipe", "1f1b, zb-h1, zb-h2, dualpipev"],
    ),
    "schedule of one rank": (
        1,
        f"{GOOD} --pipeline-schedule zb-h1",
        ["--pipeline-schedule zb-h1 has no effect with --pipeline-model-parallel-size 1"],
    ),
    "stages of zero bubble": (
        2,
        f"{GOOD} {PP} 2 --pipeline-schedule zb-h1 --num-virtual-stages-per-pipeline-rank 2",
        ["--pipeline-schedule zb-h1 has 1 virtual stage a rank", "makes 2"],
    ),
    "ends of a V": (
        2,
        f"{GOOD} {PP} 2 --pipeline-schedule dualpipev --decoder-first-pipeline-num-layers 2",
        ["the first rank has both ends of the model"],
    ),
    "trace of stages": (
        2,
        f"{MOE} {PP} 2 --moe-routing-trace-path trace",
        ["--moe-routing-trace-path is not offered yet: a trace holds the layers of one rank"],
    ),
    "replay of stages": (
        2,
        f"{MOE} {PP} 2 --moe-enable-routing-replay",
        ["--moe-enable-routing-replay with --pipeline-model-parallel-size 2 is not offered"],
    ),
    "library of stages": (
        2,
        f"{GOOD} {PP} 2 --pipeline-model-parallel-comm-backend ucc",
        ["stages talk over the library of --distributed-backend"],
    ),
}
