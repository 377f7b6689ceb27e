"""The language of ``--pipeline-model-parallel-layout``: ``E|(t|)*3,m|L`` and back. Pure.

    E  embedding          |  the next stage begins
    t  transformer layer  *N the symbol or the bracket before it, N times
    m  MTP layer          () a part to repeat
    L  output head, loss  ,  nothing: for the eye

Stages count over the model; with P pipeline ranks stage s is chunk s // P of rank s % P. A stage
may be empty, as the second one of ``E||t|L``.

Source: Megatron-LM's page on custom pipeline layouts, whose examples are in the tests.
"""

import re
from collections.abc import Iterable
from itertools import groupby

from megatron.core.errors import ConfigError

FLAG = "--pipeline-model-parallel-layout"
SYMBOLS = {
    "E": "the embedding",
    "t": "a transformer layer",
    "m": "an MTP layer",
    "L": "the output head and the loss",
    "|": "the end of a stage",
}
MAX_SYMBOLS = 100_000
_TIMES = re.compile(r"\*(\d+)")


def parse_layout(text: str) -> tuple[str, ...]:
    """Return the symbols of each stage: ``Et*2|L`` gives ``("Ett", "L")``.

    Raises:
        ConfigError: The text is not in the language; says what is wrong and at which character.
    """
    opened: list[tuple[int, str]] = []  # where each open bracket is, and the symbols before it
    done, last = "", ""  # the symbols so far, and those that a following *N repeats
    place = 0
    while place < len(text):
        char = text[place]
        times = _TIMES.match(text, place)
        if times:
            done, last = done + last * (_count(text, place, last, times[1], done) - 1), ""
            place = times.end()
            continue
        if char == "(":
            opened.append((place, done))
            done, last = "", ""
        elif char == ")" and opened:
            last = done
            done = opened.pop()[1] + last
        elif char in SYMBOLS:
            last = char
            done += last
        elif char == ",":
            last = ""
        else:
            raise _wrong(text, place, _complaint(char))
        place += 1
    if opened:
        raise _wrong(text, opened[-1][0], "this bracket is not closed")
    return tuple(done.split("|"))


def format_layout(stages: Iterable[str]) -> str:
    """Write stages in the language, runs of a symbol and of equal stages made short.

    ``parse_layout`` of the result gives the stages again.
    """
    written = []
    for stage, run in groupby(stages):
        short = "".join(_repeated(symbol, len(list(same))) for symbol, same in groupby(stage))
        written.append((short, len(list(run))))
    *most, (final, final_times) = written
    # The last stage has no | behind it, so that a run of it leaves one out.
    most += [(final, final_times - 1)] if final_times > 1 else []
    return "".join(_stages(short, times) for short, times in most) + final


def _stages(short: str, times: int) -> str:
    return f"({short}|)*{times}," if times > 1 else f"{short}|"


def _repeated(symbol: str, times: int) -> str:
    return f"{symbol}*{times}" if times > 2 else symbol * times


def _count(text: str, place: int, last: str, number: str, done: str) -> int:
    """Return how often to repeat ``last``, or refuse."""
    times = int(number)
    if not last:
        raise _wrong(text, place, "there is nothing before it to repeat")
    if times < 1:
        raise _wrong(text, place, "a part must come at least once")
    if len(done) + len(last) * times > MAX_SYMBOLS:
        raise _wrong(text, place, f"it makes more than {MAX_SYMBOLS} symbols")
    return times


def _complaint(char: str) -> str:
    if char == "*":
        return "a number must follow"
    if char == ")":
        return "no bracket is open"
    known = ", ".join(f"{symbol} ({meaning})" for symbol, meaning in SYMBOLS.items())
    return f"known are {known}, and ( ) *N ,"


def _wrong(text: str, place: int, why: str) -> ConfigError:
    return ConfigError(f"{FLAG} {text!r}: {text[place]!r} at character {place + 1}: {why}")
