"""A layout that cannot be is refused with formula and numbers, and with layouts that can be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.errors import ConfigError
from megatron.training.arguments import parse_args
from megatron.training.config.legal_layouts import OPTION_OF_AXIS
from tests.functional.bad_layouts import LAYOUTS, MOE
from tests.functional.bad_pipeline_layouts import PIPELINES
from tests.helpers.processes import child_seconds

ROOT = Path(__file__).parents[2]
HEAD = "nearest legal layouts on "
ALL = LAYOUTS | PIPELINES
BALANCED = "--pipeline-model-parallel-layout auto"


@pytest.mark.parametrize("name", ALL)
def test_bad_layout_is_named_and_legal_ones_are_offered(name):
    case = ALL[name]
    error = refusal(case.line, case.world_size)
    for text in case.says:
        assert text in str(error)
    lines = [line for line in str(error).splitlines() if line.startswith(HEAD)]
    assert len(lines) == (case.offers is not None)
    if case.offers is not None:
        assert re.match(rf"{HEAD}{case.world_size} ranks?[^:]*: {case.offers}", lines[0]), lines[0]


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if case.offers])
def test_every_layout_that_is_offered_is_accepted(name):
    case = ALL[name]
    text = str(refusal(case.line, case.world_size))
    layouts, other_world = offered(text)
    assert layouts
    for layout in layouts:
        line = with_layout(case.line, layout)
        if "once the other problems are mended" in text:
            assert HEAD not in str(refusal(line, case.world_size))
        else:
            model = parse_args(line, world_size=case.world_size).model
            assert model.data_ranks(case.world_size) == layout["dp"]
    if other_world is not None:
        parse_args(case.line.split(), world_size=other_world)
    if f"as asked with {BALANCED}" in text:
        parse_args([*case.line.split(), *BALANCED.split()], world_size=case.world_size)


def test_a_split_that_is_wrong_can_be_left_to_the_balance_of_costs():
    found = [case for case in ALL.values() if any("legal: as asked with" in t for t in case.says)]
    assert len(found) == 3
    for case in found:
        words = case.line.split()
        words[words.index("--pipeline-model-parallel-layout") + 1] = "auto"
        parse_args(words, world_size=case.world_size)


def refusal(line, world_size):
    """Return the error that a command line ends in."""
    words = line.split() if isinstance(line, str) else line
    with pytest.raises(ConfigError) as error:
        parse_args(words, world_size=world_size)
    return error.value


def offered(text):
    """Return the layouts of a message, axis -> size, and the other number of ranks, if any."""
    (line,) = [line for line in text.splitlines() if line.startswith(HEAD)]
    words = line.split(": ", 1)[1].split("; ")
    other = re.fullmatch(r"or as asked on (\d+) ranks", words[-1])
    layouts = []
    for layout in (word for word in words if not word.startswith("or ")):
        sizes = {axis.lower(): int(size) for axis, size in re.findall(r"([A-Z]+) (\d+)", layout)}
        layouts.append(sizes | ({"etp": None} if "without ETP" in layout else {}))
    return layouts, int(other[1]) if other else None


def with_layout(line, layout):
    """Return the words of a command line, with the sizes of a layout for those that it has."""
    words = line.split()
    for axis, option in OPTION_OF_AXIS.items():
        flag = f"--{option.replace('_', '-')}"
        if axis not in layout:
            continue  # as asked
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
        words += [flag, str(layout[axis])] if layout[axis] is not None else []
    return words


def test_sequence_parallelism_of_one_rank_is_told_not_refused():
    config = parse_args([*MOE.split(), "--sequence-parallel"], world_size=2)
    assert any("nothing to split" in notice for notice in config.notices)


def test_a_model_that_is_not_known_gets_no_advice():
    line = f"{MOE} --num-expertz 9 --expert-model-parallel-size 3"
    assert HEAD not in str(refusal(line, 4))


PROGRAM = """
import runpy, sys
try:
    runpy.run_path("pretrain_gpt.py", run_name="__main__")
finally:
    sys.stderr.write("TORCH" if "torch" in sys.modules else "")
"""


@pytest.mark.parametrize(("name", "ranks"), [("ep and slices of the world", 3), ("many ranks", 1)])
def test_the_program_tells_it_once_over_all_ranks_of_torchrun(name, ranks):
    case, before = LAYOUTS[name], child_seconds()
    world = {"WORLD_SIZE": str(case.world_size)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *case.line.split()],
            cwd=ROOT,
            env=os.environ | world | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=60) for process in started]
    told = "".join(stderr for _, stderr in said)
    assert [process.returncode for process in started] == [2] * ranks, told
    assert child_seconds() - before < 3 * ranks
    assert not any(stdout for stdout, _ in said)
    assert told.count("invalid configuration") == told.count(HEAD) == 1
    assert "TORCH" not in told
    assert "Traceback" not in told
