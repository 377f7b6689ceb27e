"""Mistakes in options of the optimizer; see bad_input.py."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"

OPTIMIZER_CASES: dict[str, tuple[int, str, list[str]]] = {
    "falling weight decay": (
        1,
        f"{GOOD} --weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
        ["--start-weight-decay 0.2 must lie between 0 and --end-weight-decay 0.1"],
    ),
    "constant weight decay": (
        1,
        f"{GOOD} --start-weight-decay 0.2 --end-weight-decay 0.1",
        ["no effect with --weight-decay-incr-style constant"],
    ),
    "weight decay": (1, f"{GOOD} --weight-decay-incr-style cosine", ["--start-weight-decay and"]),
    "adam flags": (1, f"{GOOD} --optimizer sgd --adam-beta1 0.5", ["with --optimizer sgd"]),
    "sgd flags": (1, f"{GOOD} --sgd-momentum 0.5", ["no effect with --optimizer adam"]),
}
