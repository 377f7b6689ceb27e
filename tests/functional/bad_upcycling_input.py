"""Mistakes in upcycling at the start of a run; see ``bad_input``."""

_GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
_MOE = f"{_GOOD} --num-experts 8 --moe-use-upcycling"
_FROM = "--pretrained-checkpoint /no/dense"

UPCYCLING_CASES: dict[str, tuple[int, str, list[str]]] = {
    "slices of no upcycling": (
        1,
        f"{_GOOD} --num-experts 8 --moe-upcycling-granularity 2",
        ["--moe-upcycling-granularity 2 has no effect without --moe-use-upcycling"],
    ),
    "no slices": (
        1,
        f"{_MOE} --moe-upcycling-granularity 0 --save x --load .",
        ["--moe-upcycling-granularity 0 must be at least 1", "--load . has no checkpoint"],
    ),
    "upcycled from nothing": (
        1,
        f"{_MOE} --save x",
        ["--moe-use-upcycling needs the dense checkpoint: --load, or --pretrained-checkpoint"],
    ),
    "upcycled to nowhere": (
        1,
        f"{_MOE} --load .",
        ["--moe-use-upcycling needs --save", "--load . has no checkpoint"],
    ),
    "upcycled in its place": (
        1,
        f"{_MOE} --load . --save .",
        ["--save . must not be the folder of the dense one", "--load . has no checkpoint"],
    ),
    "upcycled to no experts": (
        1,
        f"{_GOOD} --moe-use-upcycling --save x --load .",
        ["--moe-use-upcycling needs a MoE layer: add --num-experts", "--load . has no checkpoint"],
    ),
    "upcycled later than at the first start": (
        1,
        f"{_MOE} --save x --load y {_FROM}",
        [
            "--moe-use-upcycling with --pretrained-checkpoint needs --load y to be --save x",
            "/no/dense has no checkpoint",
        ],
    ),
    "upcycled in a store": (
        1,
        f"{_MOE} --save x --pretrained-checkpoint memory://dense",
        ["--moe-use-upcycling works in folders: --pretrained-checkpoint memory://dense is a URL"],
    ),
    "upcycled or fresh": (
        1,
        f"{_MOE} --save x --load . --allow-fresh-start",
        ["--allow-fresh-start has no effect with --moe-use-upcycling"],
    ),
}
