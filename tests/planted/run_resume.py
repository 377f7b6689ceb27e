"""Plant each omission of omissions.py, and see `tools/verify_resume.py` name the item.

    python -m tests.planted.run_resume [words of a name, or R12 ...]

First the tool runs without one and must pass. Exit code 1 when an omission is not seen, or is
called something else.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.planted.omissions import OMISSIONS, Omission
from tests.planted.plants import chosen, copy_project, in_place, run_in, say

OPTIONS = "--nproc 2 --iterations 6 --layouts none"
FLAGS = """
    --mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 4
    --moe-router-topk 2 --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --expert-model-parallel-size 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 8
    --hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 20 --lr 1e-2 --min-lr 1e-3
    --lr-decay-style cosine --lr-warmup-iters 3 --device cpu
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the omissions whose name or number has one of the words; all when there are none."""
    omissions = chosen(OMISSIONS, argv, __doc__.splitlines()[0], "R12")
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        copy_project(copy)
        wrong = [flags for flags in {one.flags for one in omissions} if not passes(copy, flags)]
        missed = [omission for omission in omissions if not is_named(copy, omission)]
    say(f"{len(omissions) - len(missed)} of {len(omissions)} omissions are called what they are")
    return int(bool(wrong or missed))


def verify(copy: Path, flags: str, options: str = OPTIONS) -> subprocess.CompletedProcess[str]:
    """Run the tool in the copy; its report is in ``report.json`` there."""
    (copy / "report.json").unlink(missing_ok=True)
    words = [*options.split(), "--json", "report.json", "--", *FLAGS.split(), *flags.split()]
    return run_in(copy, ["tools/verify_resume.py", *words])


def passes(copy: Path, flags: str) -> bool:
    """Run without an omission; say how it went."""
    done = verify(copy, flags)
    said = [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()
    say(f"without an omission {flags}: exit code {done.returncode}", *said)
    return done.returncode == 0


def is_named(copy: Path, omission: Omission) -> bool:
    """Plant, run, take it out again; say how it went."""
    start = time.monotonic()
    with in_place(copy, omission):
        done = verify(copy, omission.flags)
    missing = unsaid(copy, omission, done)
    seconds = time.monotonic() - start
    verdict = "MISSED" if missing else "named "
    said = (done.stdout + done.stderr).splitlines() if missing else []
    say(f"{verdict} {omission.invariant:4}{omission.name} ({seconds:.0f} s)", *missing, *said)
    return not missing


def unsaid(copy: Path, omission: Omission, done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what the tool should have said of ``omission`` and did not."""
    report = copy / "report.json"
    if done.returncode != 1 or not report.exists():
        return [f"wanted: exit code 1, not {done.returncode}"]
    causes = [cause["item"] for cause in json.loads(report.read_text())["causes"]]
    missing = []
    if causes != [omission.item]:
        missing.append(f"wanted: {omission.item} alone, not {', '.join(causes) or 'nothing'}")
    first = [line for line in done.stdout.splitlines() if line.startswith(("first: ", "likely: "))]
    if omission.words not in "\n".join(first):
        missing.append(f"wanted: {omission.words}")
    return missing


if __name__ == "__main__":
    sys.exit(main())
