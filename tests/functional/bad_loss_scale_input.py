"""Mistakes in options of fp16 and its loss scale; see bad_input.py."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
FP16 = f"{GOOD} --fp16"

LOSS_SCALE_CASES: dict[str, tuple[int, str, list[str]]] = {
    "fp16 and bf16": (1, f"{FP16} --bf16", ["--fp16 and --bf16 exclude each other"]),
    "fp16 and fp64": (1, f"{FP16} --fp64", ["--fp16 and --fp64 exclude each other"]),
    "three precisions": (
        1,
        f"{FP16} --bf16 --fp64",
        ["--fp16, --bf16 and --fp64 exclude each other; give one of them"],
    ),
    "loss scale without fp16": (
        1,
        f"{GOOD} --bf16 --loss-scale 1024",
        ["--loss-scale 1024 has no effect without --fp16"],
    ),
    "dynamic loss scale without fp16": (
        1,
        f"{GOOD} --initial-loss-scale 1024 --hysteresis 3",
        ["--initial-loss-scale 1024, --hysteresis 3 have no effect without --fp16"],
    ),
    "constant and dynamic loss scale": (
        1,
        f"{FP16} --loss-scale 1024 --min-loss-scale 2 --loss-scale-window 500",
        ["--min-loss-scale 2, --loss-scale-window 500 have no effect with --loss-scale, which"],
    ),
    "loss scale of 0": (1, f"{FP16} --loss-scale 0", ["--loss-scale 0 must be above 0"]),
    "loss scale beyond fp32": (
        1,
        f"{FP16} --loss-scale 1e39",
        ["--loss-scale 1e+39 must be above 0 and at most 1.84467e+19"],
    ),
    "first loss scale of 0": (
        1,
        f"{FP16} --initial-loss-scale 0 --min-loss-scale 0",
        ["--initial-loss-scale 0 must be above 0", "--min-loss-scale 0 must be above 0"],
    ),
    "smallest loss scale": (
        1,
        f"{FP16} --initial-loss-scale 16 --min-loss-scale 32",
        ["--min-loss-scale 32 must be at most --initial-loss-scale 16"],
    ),
    "part of an update": (
        1,
        f"{FP16} --loss-scale-window 2.5",
        ["--loss-scale-window 2.5 counts updates: give a whole number"],
    ),
    "no window": (1, f"{FP16} --loss-scale-window 0", ["--loss-scale-window 0 must be at least 1"]),
    "no hysteresis": (1, f"{FP16} --hysteresis 0", ["--hysteresis 0 must be at least 1"]),
    "fused activation in fp16": (
        1,
        f"{FP16} --num-experts 8 --swiglu --moe-fused-activation compiled",
        ["computes bf16 and fp32 only: leave --fp16 or it out"],
    ),
}
