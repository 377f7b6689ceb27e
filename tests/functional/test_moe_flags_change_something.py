"""Every --moe-* flag changes something that can be seen; none parses and does nothing."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.moe_flags import CASES, MOE, Case
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
OBSERVERS = sorted({case.observe for case in CASES.values()}, key=lambda f: f.__name__)


def flags_with_effect(page: str) -> set[str]:
    """Return the --moe-* options of docs/flags.md, not those accepted without effect."""
    options, _, _ = page.partition("## Accepted without effect")
    return set(re.findall(r"^\| `(--moe-[\w-]+)", options, re.MULTILINE))


def test_every_moe_flag_of_the_page_has_a_case_and_every_case_a_flag():
    documented = flags_with_effect((ROOT / "docs/flags.md").read_text())
    assert len(documented) >= 25
    assert documented - set(CASES) == set(), "add a row to CASES in tests/functional/moe_flags.py"
    assert set(CASES) - documented == set(), "flags that are no longer there"


def test_a_flag_of_the_page_is_found_and_one_without_effect_is_not():
    page = "| `--moe-a` | x |\n## Accepted without effect\n| `--moe-b` |  | y |\n"
    assert flags_with_effect(page) == {"--moe-a"}


def _differs(flag: str, case: Case) -> None:
    without = case.observe(f"{case.both} {case.first}")
    assert case.observe(f"{case.both} {case.second}") != without, f"{flag} changed nothing"


@pytest.mark.parametrize(
    "flag", [pytest.param(f, marks=[pytest.mark.slow] * ("-trace-max-" in f)) for f in CASES]
)
def test_the_flag_changes_something(flag):
    case = CASES[flag]
    assert flag in case.second.split(), "the case is about another flag"
    assert flag not in case.both.split()
    run_ranks(_differs, 1, flag, case)


def _repeats(observe: Callable[[str], object]) -> None:
    line = f"{MOE} --moe-router-topk 2 --expert-model-parallel-size 1"
    assert observe(line) == observe(line)


@pytest.mark.parametrize("observe", OBSERVERS, ids=lambda f: f.__name__)
def test_the_same_flags_show_no_difference(observe):
    run_ranks(_repeats, 1, observe)
