"""What users get wrong about windows, sinks and scales of attention; see ``bad_input``."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"

# name -> (world size, command line, what the message must say)
CORE_ATTENTION_CASES: dict[str, tuple[int, str, list[str]]] = {
    "window to the right": (
        1,
        f"{GOOD} --window-size 8,8",
        ["--window-size 8,8: the right side must be 0, attention sees no later position"],
    ),
    "window below -1": (
        1,
        f"{GOOD} --window-size=-2,0",
        ["--window-size -2,0: the left side must be at least 0, or -1 for all"],
    ),
    "window of one number": (
        1,
        f"{GOOD} --window-size 128",
        ["'128' must be two whole numbers, such as 127,0"],
    ),
    "window of words": (1, f"{GOOD} --window-size wide", ["'wide' must be two whole numbers"]),
    "layers of no window": (
        1,
        f"{GOOD} --window-attn-skip-freq 2",
        ["--window-attn-skip-freq has no effect without --window-size"],
    ),
    "every 0th layer without a window": (
        1,
        f"{GOOD} --window-size 7,0 --window-attn-skip-freq 0",
        ["--window-attn-skip-freq 0 must be at least 1"],
    ),
    "windows of 3 layers": (
        1,
        f"{GOOD} --window-size 7,0 --window-attn-skip-freq [1,0,1]",
        ["--window-attn-skip-freq has 3 entries, one for each of --num-layers 4 is needed"],
    ),
    "windows of two kinds": (
        1,
        f"{GOOD} --window-size 7,0 --window-attn-skip-freq [1,0,1,2]",
        ["--window-attn-skip-freq [1, 0, 1, 2] may hold 1 (a window) and 0 (none) only"],
    ),
    "unknown softmax": (
        1,
        f"{GOOD} --softmax-type off_by_one",
        ["must be one of vanilla, off-by-one, learnable; did you mean off-by-one?"],
    ),
    "scale of 0": (1, f"{GOOD} --softmax-scale 0", ["--softmax-scale 0 must be above 0"]),
    "cap below 0": (
        1,
        f"{GOOD} --attn-logit-softcapping -30",
        ["--attn-logit-softcapping -30 must be above 0"],
    ),
    "four mistakes of attention": (
        1,
        f"{GOOD} --window-size 7,1 --window-attn-skip-freq 0 --softmax-scale 0 --softmax-type sink",
        [
            "the right side must be 0",
            "--window-attn-skip-freq 0 must be at least 1",
            "--softmax-scale 0 must be above 0",
            "--softmax-type sink: must be one of",
        ],
    ),
}
