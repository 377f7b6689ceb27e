"""The list of planted bugs of layouts does not rot; `make planted-layouts` runs it."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.planted import plants, run_layouts
from tests.planted.layout_bugs import LAYOUT_BUGS
from tools.layouts.quick import QUICK

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", LAYOUT_BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted(bug):
    text = (ROOT / bug.file).read_text()
    changed = plants.planted(text, bug)
    assert changed != text
    compile(changed, bug.file, "exec")


@pytest.mark.parametrize("bug", LAYOUT_BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_looked_for_in_a_quick_layout_and_has_a_first_tensor(bug):
    assert bug.layout in QUICK
    assert re.compile(bug.first).pattern
    assert bug.cause


def test_there_are_twenty_of_all_kinds():
    assert len({bug.name for bug in LAYOUT_BUGS}) == len(LAYOUT_BUGS) >= 20
    counts = Counter(bug.invariant for bug in LAYOUT_BUGS)
    assert {"R1", "R2", "R3", "R7", "R14"} <= set(counts)
    assert min(counts[number] for number in ("R1", "R2", "R3", "R7", "R14")) >= 2


def test_what_the_tool_does_not_say_is_told():
    bug = next(bug for bug in LAYOUT_BUGS if bug.factor)
    said = f"first: {bug.first.replace(chr(92), '')}\n{bug.factor}\nlikely: it is {bug.cause}"
    assert run_layouts.unsaid(bug, said) == []
    assert len(run_layouts.unsaid(bug, "")) == 3
