"""Mistakes about the residual stream: command lines and what the message must say."""

_GPT = "--num-layers 4 --hidden-size 64 --mock-data"

# as in bad_input.py
SCALING_CASES: dict[str, tuple[int, str, list[str]]] = {
    "one norm for branches that follow each other": (
        1,
        f"{_GPT} --parallel-residual-shared-norm",
        ["--parallel-residual-shared-norm needs --parallel-residual"],
    ),
    "factors of nothing": (
        1,
        f"{_GPT} --embedding-multiplier 0 --residual-multiplier -1 --logits-multiplier 0",
        [
            "--embedding-multiplier 0 must be above 0",
            "--residual-multiplier -1 must be above 0",
            "--logits-multiplier 0 must be above 0",
        ],
    ),
    "a cap of nothing": (
        1,
        f"{_GPT} --final-logit-softcapping 0",
        ["--final-logit-softcapping 0 must be above 0"],
    ),
}
