"""Plant each bug of bugs.py in a copy of the project, and see its tests fail: `make planted`.

    python -m tests.planted.run [words of a name, or R4 ...]

First the tests run without a bug and must pass. Exit code 1 when a bug is not seen.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.node_ids import nodes_in
from tests.planted.bugs import BUGS, Bug
from tests.planted.layout_bugs import LayoutBug

ROOT = Path(__file__).parents[2]
COPIED = ("megatron", "tests", "tools", "docs", "examples", "pretrain_gpt.py", "pyproject.toml")
OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) (tests/.*)$", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bugs whose name or number has one of the words; all when there are none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of names, or numbers such as R4")
    words = parser.parse_args(argv).words
    bugs = [b for b in BUGS if not words or any(w in (b.invariant, *b.name.split()) for w in words)]
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        copy_project(copy)
        every = sorted({test for bug in bugs for test in bug.tests})
        failed = every_test_but(outcomes(copy, every), every, "PASSED")
        _say(f"without a bug: {len(every)} tests, {len(failed)} fail", *failed)
        missed = [bug for bug in bugs if not is_seen(copy, bug)]
    _say(f"{len(bugs) - len(missed)} of {len(bugs)} bugs are seen by all of their tests")
    return int(bool(failed or missed))


def copy_project(to: Path) -> None:
    """Copy what tests need; nothing of it is compiled yet."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def planted(text: str, bug: Bug | LayoutBug) -> str:
    """Return the source ``text`` with the bug in it."""
    assert text.count(bug.old) == 1, f"{bug.name}: its text stands {text.count(bug.old)} times"
    return text.replace(bug.old, bug.new)


def is_seen(copy: Path, bug: Bug) -> bool:
    """Plant, run, take it out again; say how it went."""
    path, start = copy / bug.file, time.monotonic()
    text = path.read_text()
    path.write_text(planted(text, bug))
    try:
        blind = every_test_but(outcomes(copy, bug.tests), bug.tests, "FAILED")
    finally:
        path.write_text(text)
    seconds = time.monotonic() - start
    _say(f"{'MISSED' if blind else 'seen  '} {bug.invariant:4}{bug.name} ({seconds:.0f} s)", *blind)
    return not blind


def outcomes(copy: Path, tests: Sequence[str]) -> dict[str, set[str]]:
    """Run ``tests`` in the copy; return for each what became of it, case by case."""
    ids = {test: _path(test) for test in tests}
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--tb=no",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *dict.fromkeys(ids.values())],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
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


def _say(line: str, *more: str) -> None:
    sys.stdout.write("\n    ".join([line, *more]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
