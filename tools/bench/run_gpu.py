"""Everything that needs a GPU, unattended: its tests, then every bench; a page of what came out.

Each part is a process with a limit of time, and what fails does not stop the rest. Writes
``<card>_<date>.md`` and ``.json`` with card, driver and clocks before and after. Needs 78 GiB of a
card and a quarter of an hour at the default sizes. The exit code counts the parts that failed.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.cards import card_facts, card_name
from tools.bench.run_all import benches
from tools.bench.timing import machine

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "benchmarks"
FIRST = ("gpu_mfu", "gpu_kernels", "step")
OF_CPUS = re.compile(
    "checkpoint|expert_overlap|moe_|overlap|preprocess|roofline|sample_index|scaling|slow|start|"
    "step_|two_ranks|memory|cpu"
)
"""Names of benches that measure a CPU, its disk or its network, whatever else is there."""
_TAIL = 25


class Part(NamedTuple):
    """A process that is run, and the JSON that it leaves."""

    name: str
    words: list[str]
    seconds: float
    """Its limit."""


class Result(NamedTuple):
    """What became of a part."""

    name: str
    state: str
    """ok, failed (with the exit code) or too long; or left out, for want of time."""
    seconds: float
    rows: list[dict[str, Any]]
    tail: list[str]
    """Last lines of what it printed."""


def parts(args: argparse.Namespace, folder: Path) -> list[Part]:
    """Return the tests, then the benches, most wanted first."""
    python = sys.executable
    tests = Part(
        "tests",
        [python, "-m", "pytest", "tests/gpu", "-q", "-ra", "-p", "no:cacheprovider"],
        args.test_seconds,
    )
    found = [path for path in benches() if not OF_CPUS.search(path.stem)]
    found.sort(key=lambda path: (path.stem not in FIRST, path.stem != FIRST[0], path.stem))
    wanted = [p for p in found if not args.benches or p.stem in args.benches]
    small = {"gpu_mfu": args.gpu_mfu, "gpu_kernels": args.gpu_kernels, "step": args.step}
    return [tests] * (not args.no_tests) + [
        Part(
            path.stem,
            [python, str(path), *small.get(path.stem, "").split(), "--output", str(folder)],
            args.bench_seconds,
        )
        for path in wanted
    ]


def run_part(part: Part, folder: Path, seconds: float) -> Result:
    """Run one part for at most ``seconds``; nothing that it does is an error here."""
    if seconds <= 0:
        return Result(part.name, "left out: no time left", 0.0, [], [])
    began, log = time.monotonic(), folder / f"{part.name}.log"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        child = subprocess.Popen(
            part.words, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = child.wait(timeout=seconds)
            state = "ok" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"too long: stopped after {seconds:.0f} s"
        finally:  # what it started holds memory of the card
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    tail = log.read_text(errors="replace").splitlines()[-_TAIL:]
    try:
        rows = json.loads((folder / f"{part.name}.json").read_text())["rows"]
    except (OSError, ValueError, KeyError):
        rows = []
    return Result(part.name, state, time.monotonic() - began, rows, tail)


def page(facts: dict[str, Any], results: list[Result]) -> str:
    """Return the page in Markdown."""
    lines = [f"# {facts['card']}, {facts['date']}", ""]
    lines += ["Written by `make bench-gpu` (`tools/bench/run_gpu.py`).", ""]
    lines += ["| fact | before | after |", "|---|---|---|"]
    names = dict.fromkeys([*facts["before"], *facts["after"]])
    lines += [
        f"| {n} | {facts['before'].get(n, '')} | {facts['after'].get(n, '')} |" for n in names
    ]
    lines += [f"| {name} | {value} | |" for name, value in facts["machine"].items()]
    lines += ["", "| part | result | seconds |", "|---|---|---|"]
    lines += [f"| {r.name} | {r.state} | {r.seconds:.0f} |" for r in results]
    for result in results:
        lines += ["", f"## {result.name}", ""]
        lines += _table(result.rows)
        if result.name == "tests" or result.state != "ok":
            lines += ["```", *result.tail, "```"]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(_cell(row.get(k)) for k in head) + " |" for row in rows)]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=PAGES)
    parser.add_argument("--logs", type=Path, default=ROOT / "runs" / "bench_gpu")
    parser.add_argument("--minutes", type=float, default=15.0, help="For everything.")
    parser.add_argument("--test-seconds", type=float, default=300.0, help="For tests/gpu.")
    parser.add_argument("--bench-seconds", type=float, default=240.0, help="For each bench.")
    parser.add_argument("--benches", nargs="+", help="Which; all when not given.")
    parser.add_argument("--no-tests", action="store_true", help="Leave tests/gpu out.")
    for name in ("gpu_mfu", "gpu_kernels", "step"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default="", help=f"Options of {name}, in one word.")
    return parser.parse_args(words)


def main() -> int:
    """Run the parts, write the page, and say where it is."""
    args = parse()
    if args.output == PAGES and card_name() == "cpu":
        print(f"there is no CUDA device: nothing goes to {PAGES}; --output elsewhere tries it out")
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d")
    stem = f"{re.sub('[^a-z0-9]+', '_', card_name().lower()).strip('_')}_{date}"
    folder = args.logs / stem
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60.0 * args.minutes
    facts: dict[str, Any] = {"card": card_name(), "date": date, "machine": machine()}
    facts["before"] = facts["after"] = card_facts()
    results: list[Result] = []
    for part in parts(args, folder):
        left = deadline - time.monotonic()
        results.append(run_part(part, folder, min(part.seconds, left)))
        facts["after"] = card_facts()
        print(f"{part.name}: {results[-1].state} ({results[-1].seconds:.0f} s)", flush=True)
        whole = facts | {"parts": [result._asdict() for result in results]}
        (args.output / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n")
        (args.output / f"{stem}.md").write_text(page(facts, results))
    print(f"written: {args.output / stem}.md")
    return sum(result.state != "ok" for result in results)


if __name__ == "__main__":
    sys.exit(main())
