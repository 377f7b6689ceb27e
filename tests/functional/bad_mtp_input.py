"""Mistakes about multi-token prediction: command lines and what the message must say."""

_GPT = "--num-layers 4 --hidden-size 64 --mock-data"
_LAYOUT = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout"

# as in bad_input.py
MTP_CASES: dict[str, tuple[int, str, list[str]]] = {
    "no depth": (1, f"{_GPT} --mtp-num-layers 0", ["--mtp-num-layers 0 must be at least 1"]),
    "factor of no depth": (
        1,
        f"{_GPT} --mtp-loss-scaling-factor 0.3",
        ["--mtp-loss-scaling-factor 0.3 has no effect without --mtp-num-layers"],
    ),
    "factor below 0": (
        1,
        f"{_GPT} --mtp-num-layers 1 --mtp-loss-scaling-factor -1",
        ["--mtp-loss-scaling-factor -1 must be at least 0"],
    ),
    "further ahead than a sequence": (
        1,
        f"{_GPT} --seq-length 8 --mtp-num-layers 8",
        ["--mtp-num-layers 8 must be below --seq-length 8"],
    ),
    "depths away from the head": (
        2,
        f"{_GPT} --mtp-num-layers 1 {_LAYOUT} Ettttm|L",
        ["each m must be in the stage of L"],
    ),
    "a layout without its depths": (
        2,
        f"{_GPT} --mtp-num-layers 1 {_LAYOUT} Ett|ttL",
        ["has 0 m, but --mtp-num-layers is 1"],
    ),
    "other ways of Megatron's": (
        1,
        f"{_GPT} --mtp-num-layers 1 --mtp-use-repeated-layer",
        ["--mtp-use-repeated-layer is a Megatron-LM flag not offered here"],
    ),
}
