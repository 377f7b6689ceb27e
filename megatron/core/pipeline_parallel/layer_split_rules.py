"""Which splits of layers over stages are legal, and the nearest legal ones to the others. Pure.

Problems are sentences in the user's flags; layer_split.py raises them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from megatron.core.pipeline_parallel.layout_string import FLAG

Ends = tuple[int | None, int | None]
"""Layers of the first and of the last rank, where they are given."""
_END_FLAGS = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
_PER_STAGE = "--num-layers-per-virtual-pipeline-stage"
_PER_RANK = "--num-virtual-stages-per-pipeline-rank"
_ACCOUNT = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
_EXCLUDE = (
    *((FLAG, other, "the layout says all of it") for other in (_PER_STAGE, *_END_FLAGS, *_ACCOUNT)),
    (_PER_STAGE, _PER_RANK, "one follows from the other"),
    *((end, _PER_STAGE, f"stages differ in layers, give {_PER_RANK}") for end in _END_FLAGS),
    *(
        (end, account, "take the part off your own number of layers")
        for end in _END_FLAGS
        for account in _ACCOUNT
    ),
)
_NEIGHBOURS, _REACH = 3, 64


def clashes(options: Mapping[str, int | str | bool | None]) -> Iterator[str]:
    """Yield what is wrong with options (``SplitOptions``, as a mapping) whatever the numbers."""
    given = {
        f"--{name.replace('_', '-')}": value
        for name, value in options.items()
        if value is not None and value is not False
    }
    for flag, value in given.items():
        least = 0 if flag == "--mtp-num-layers" else 1
        if isinstance(value, int) and value < least:
            yield f"{flag} {value} must be at least {least}"
    for flag, other, why in _EXCLUDE:
        if flag in given and other in given:
            yield f"{flag} and {other} exclude each other: {why}"
    for end in _END_FLAGS:
        if end in given and given.get("--pipeline-model-parallel-size") == 1:
            yield f"{end} needs --pipeline-model-parallel-size 2 or more; with 1 it has all layers"


def layers_of_ranks(num_layers: int, pp: int, vpp: int, ends: Ends) -> list[int] | None:
    """Return the layers of each rank, the ends as given and the others even; None if it fails."""
    first, last = ([] if end is None else [end] for end in ends)
    others = pp - len(first) - len(last)
    left = num_layers - sum(first) - sum(last)
    if others < 0 or left < 0 or (left % others if others else left):
        return None
    ranks = [*first, *[left // others if others else 0] * others, *last]
    return None if any(layers % vpp for layers in ranks) else ranks


def ends_text(ends: Ends) -> str:
    """Write ``ends`` as flags."""
    pairs = zip(_END_FLAGS, ends, strict=True)
    return " ".join(f"{flag} {end}" for flag, end in pairs if end is not None)


def legal_ends(num_layers: int, pp: int, vpp: int, ends: Ends) -> str:
    """Name the legal values of the given ends that are nearest."""
    choices = [
        [None]
        if end is None
        else list(range(max(end - _REACH, 1), min(end + _REACH, num_layers) + 1))
        for end in ends
    ]
    legal = [
        tried
        for tried in product(*choices)
        if layers_of_ranks(num_layers, pp, vpp, (tried[0], tried[1])) is not None
    ]
    legal.sort(
        key=lambda tried: sum(abs((a or 0) - (b or 0)) for a, b in zip(tried, ends, strict=True))
    )
    texts = [ends_text((tried[0], tried[1])) for tried in legal[:_NEIGHBOURS]]
    return ", or ".join(texts) or "none with these sizes"


def legal_even_splits(num_layers: int, extra: int, pp: int, unit: int) -> str:
    """Name the nearest numbers of layers, and of pipeline ranks, that split evenly."""
    total, step = num_layers + extra, pp * unit
    below = total // step * step
    layers = [count - extra for count in (below, below + step) if count > extra]
    ranks = nearest(pp, [p for p in range(1, total + 1) if total % (p * unit) == 0])
    text = f"--num-layers {' or '.join(map(str, layers))}"
    return (
        f"{text}, --pipeline-model-parallel-size {' or '.join(map(str, ranks))}" if ranks else text
    )


def legal_units(total: int, pp: int, unit: int, *, is_layers: bool) -> str:
    """Name the nearest layers of a stage, or stages of a rank, with which ``total`` goes evenly."""
    fitting = nearest(unit, [u for u in range(1, total // pp + 1) if total % (pp * u) == 0])
    flag = "--num-layers-per-virtual-pipeline-stage" if is_layers else _PER_RANK
    return f", {flag} {' or '.join(map(str, fitting))}" if fitting else ""


def nearest(wanted: int, legal: Iterable[int]) -> list[int]:
    """Return of ``legal`` the next below and the next above ``wanted``."""
    values = sorted(legal)
    below = [value for value in values if value < wanted]
    above = [value for value in values if value > wanted]
    return below[-1:] + above[:1]


def layout_problems(
    stages: Sequence[str], *, pp: int, vpp: int | None, num_layers: int, mtp_num_layers: int
) -> Iterator[str]:
    """Yield what is wrong with the stages of a layout string, each as the end of a sentence."""
    symbols = "".join(stages)
    if len(stages) % pp:
        fitting = [size for size in range(1, len(stages) + 1) if len(stages) % size == 0]
        yield (
            f"has {len(stages)} stages, no multiple of --pipeline-model-parallel-size {pp}; legal "
            f"with {len(stages)} stages: {', '.join(map(str, fitting))}"
        )
    elif vpp is not None and len(stages) != pp * vpp:
        yield (
            f"has {len(stages)} stages, {len(stages) // pp} for each of "
            f"--pipeline-model-parallel-size {pp} ranks; {_PER_RANK} {vpp} asks for {pp * vpp}"
        )
    for symbol, flag, count in (
        ("t", "--num-layers", num_layers),
        ("m", "--mtp-num-layers", mtp_num_layers),
    ):
        if symbols.count(symbol) != count:
            yield f"has {symbols.count(symbol)} {symbol}, but {flag} is {count}"
    if symbols.count("E") != 1 or not stages[0].startswith("E"):
        yield f"must begin with its only E; it has {symbols.count('E')}"
    if symbols.count("L") != 1 or not stages[-1].endswith("L"):
        yield f"must end with its only L; it has {symbols.count('L')}"
    if "m" in symbols and "t" in symbols[symbols.index("m") :]:
        yield "has a t after an m; MTP layers come after all transformer layers"
