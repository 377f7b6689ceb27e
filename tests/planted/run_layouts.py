"""Plant each bug of layout_bugs.py, and see `tools/verify_layouts.py` name it.

    python -m tests.planted.run_layouts [words of a name, or R4 ...]

First every layout that is used runs without a bug and must be equal. Exit code 1 when a bug is not
seen, or is called something else.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.planted.layout_bugs import LAYOUT_BUGS, LayoutBug
from tests.planted.plants import chosen, copy_project, in_place, run_in, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bugs whose name or number has one of the words; all when there are none."""
    bugs = chosen(LAYOUT_BUGS, argv, __doc__.splitlines()[0], "R2")
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        copy_project(copy)
        layouts = dict.fromkeys(bug.layout for bug in bugs)
        wrong = [layout for layout in layouts if verify(copy, layout).returncode]
        say(f"without a bug: {len(layouts)} layouts, {len(wrong)} wrong", *wrong)
        missed = [bug for bug in bugs if not is_named(copy, bug)]
    say(f"{len(bugs) - len(missed)} of {len(bugs)} bugs are seen and called what they are")
    return int(bool(wrong or missed))


def verify(copy: Path, layout: str) -> subprocess.CompletedProcess[str]:
    """Run the tool in the copy on one layout."""
    return run_in(copy, ["tools/verify_layouts.py", "--layout", layout])


def is_named(copy: Path, bug: LayoutBug) -> bool:
    """Plant, run, take it out again; say how it went."""
    start = time.monotonic()
    with in_place(copy, bug):
        done = verify(copy, bug.layout)
    missing = unsaid(bug, done.stdout) if done.returncode == 1 else ["exit code 1"]
    seconds = time.monotonic() - start
    verdict = "MISSED" if missing else "named "
    said = [f"wanted: {words}" for words in missing]
    said += [line.strip() for line in done.stdout.splitlines()] if missing else []
    say(f"{verdict} {bug.invariant:4}{bug.name} ({seconds:.0f} s)", *said, *_error(done, missing))
    return not missing


def unsaid(bug: LayoutBug, said: str) -> list[str]:
    """Return what the tool should have said of ``bug`` and did not."""
    wanted = [rf"first: {bug.first}", re.escape(bug.factor), rf"likely: .*{re.escape(bug.cause)}"]
    return [words for words in wanted if not re.search(words, said)]


def _error(done: subprocess.CompletedProcess[str], missing: list[str]) -> list[str]:
    return done.stderr.splitlines()[-5:] if missing else []


if __name__ == "__main__":
    sys.exit(main())
