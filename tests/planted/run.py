"""Plant each bug of bugs.py in a copy of the project, and see its tests fail: `make planted`.

    python -m tests.planted.run [words of a name, or R4 ...]

First the tests run without a bug and must pass. Exit code 1 when a bug is not seen.
"""

import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.node_ids import nodes_in
from tests.planted.bugs import BUGS, Bug
from tests.planted.plants import ROOT, chosen, copy_project, in_place, run_in, say

OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) (tests/.*)$", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bugs whose name or number has one of the words; all when there are none."""
    bugs = chosen(BUGS, argv, __doc__.splitlines()[0], "R4")
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        copy_project(copy)
        every = sorted({test for bug in bugs for test in bug.tests})
        failed = every_test_but(outcomes(copy, every), every, "PASSED")
        say(f"without a bug: {len(every)} tests, {len(failed)} fail", *failed)
        missed = [bug for bug in bugs if not is_seen(copy, bug)]
    say(f"{len(bugs) - len(missed)} of {len(bugs)} bugs are seen by all of their tests")
    return int(bool(failed or missed))


def is_seen(copy: Path, bug: Bug) -> bool:
    """Plant, run, take it out again; say how it went."""
    start = time.monotonic()
    with in_place(copy, bug):
        blind = every_test_but(outcomes(copy, bug.tests), bug.tests, "FAILED")
    seconds = time.monotonic() - start
    say(f"{'MISSED' if blind else 'seen  '} {bug.invariant:4}{bug.name} ({seconds:.0f} s)", *blind)
    return not blind


def outcomes(copy: Path, tests: Sequence[str]) -> dict[str, set[str]]:
    """Run ``tests`` in the copy; return for each what became of it, case by case."""
    ids = {test: _path(test) for test in tests}
    options = ["-q", "-rA", "--tb=no", "-p", "no:cacheprovider"]
    done = run_in(copy, ["-m", "pytest", *options, *dict.fromkeys(ids.values())])
    found = OUTCOME.findall(done.stdout)
    assert found, done.stdout + done.stderr
    return {
        test: {what for what, line in found if re.match(re.escape(path) + r"(\[| |$)", line)}
        for test, path in ids.items()
    }


def every_test_but(found: dict[str, set[str]], tests: Sequence[str], wanted: str) -> list[str]:
    """Name the tests that did not end as wanted, in any case or, to pass, in all of them."""
    if wanted == "PASSED":
        return [test for test in tests if found[test] != {"PASSED"}]
    return [test for test in tests if wanted not in found[test]]


def _path(test: str) -> str:
    (node,) = nodes_in(f"`{test}`")
    case = f"[{node.case}]" if node.case else ""
    return f"{node.path.relative_to(ROOT)}::{node.test}{case}"


if __name__ == "__main__":
    sys.exit(main())
