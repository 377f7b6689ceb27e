"""The list of planted bugs does not rot; `make planted` runs it.

That its tests exist is checked in test_moe_features.py, with those of the page.
"""

from collections import Counter
from pathlib import Path

import pytest

from tests.planted import plants
from tests.planted.bugs import BUGS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted(bug):
    text = (ROOT / bug.file).read_text()
    changed = plants.planted(text, bug)
    assert changed != text
    compile(changed, bug.file, "exec")


def test_names_are_distinct_and_each_invariant_has_two():
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    counts = Counter(bug.invariant for bug in BUGS)
    assert set(counts) == {"R1", "R2", "R4", "R5", "R6", "R7", "R8", "R19"}
    assert min(counts.values()) >= 2


def test_a_bug_whose_text_is_gone_is_an_error():
    with pytest.raises(AssertionError, match="stands 0 times"):
        plants.planted("x = 1\n", BUGS[0])
