"""Run every bench in this folder, one process each: ``make bench``.

What a bench prints goes to a file beside its JSON; a bench that fails or takes too long does not
stop the others, and is named in the last line. At the end a page sums up all tables, and a picture
shows the step beside the others' and the limits.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.summary import write_summary

FOLDER = Path(__file__).resolve().parent
FIRST = ("step", "moe_layer", "attention", "cross_entropy", "optimizer", "dispatcher")
"""What most ask for comes first; the others follow by name."""
_SMALL = "--hidden-size 32 --vocab-size 64 --seq-length 16 --micro-batch-size 2 --rounds 1"
SHORTER = {"moe_layer": "--preset small"}
"""Options of benches that would take hours; ``--full`` leaves them out."""
QUICK = {
    "attention": "--tokens 32 --heads 2 --groups 1 --channels 16 --sequences 16 --rounds 1",
    "checkpoint": "--mib 16 --rounds 1",
    "cross_entropy": "--rows 300 --vocab-size 500 --rounds 1",
    "dispatcher": "--tokens 16 --hidden-size 16 --num-experts 4 --rounds 1",
    "expert_overlap": "--num-layers 1 --hidden-size 16 --seq-length 8 --num-microbatches 2 "
    "--way-ms 1 --rounds 1",
    "gpu_kernels": "--device cpu --tokens 32 --hidden-size 16 --moe-ffn-hidden-size 24 --rounds 1",
    "gpu_mfu": "--device cpu --hidden-size 64 --moe-ffn-hidden-size 96 --num-attention-heads 4 "
    "--num-experts 4 --vocab-size 128 --seq-length 16 --rounds 1 --warm-up 1 --peak-tflops 1",
    "metrics_cost": _SMALL,
    "moe_layer": "--preset small --tokens 64 --hidden-size 32 --moe-ffn-hidden-size 64 --cases 8x2 "
    "--rounds 1 --warm-up 1",
    "optimizer": "--parameters 1 --rounds 1",
    "overlap": "--compute-ms 1 --transfer-ms 1 --rounds 1 --hidden-size 16",
    "preprocess": "--megabytes 0.1 --vocab-size 400 --rounds 1 --workers 1",
    "profile_step": "--hidden-size 32 --vocab-size 64 --seq-length 16 --micro-batch-size 2",
    "sample_index": "--documents 1000",
    "scaling": "--quick --hidden-size 32 --vocab-size 64 --seq-length 16 --sequences 8 16 "
    "--experts 4 8 --rounds 1 --warm-up 0 --curves sequence experts --dtypes fp32",
    "startup": "--rounds 1 --no-tools --ranks",
    "step": f"{_SMALL} --warm-up 1 --parts steps roofline --contenders ours textbook "
    "transformers-grouped_mm",
    "two_ranks": "--hidden-size 32 --num-layers 2 --vocab-size 64 --seq-length 16 --rounds 1 "
    "--warm-up 0 --dtypes fp32 --global-batch-size 4 --micro-batch-size 1 --layouts ep2 pp2",
}
"""Options with which a bench takes seconds, and its figures mean nothing but that it works."""
QUICK_LIMIT_S = 120
LIMIT_S = 3600


class Outcome(NamedTuple):
    """How a bench ended."""

    name: str
    seconds: float
    problem: str
    """Empty when there was none."""


def benches() -> list[Path]:
    """Return the files that can be run, but those that run others, in their order."""
    runs = [p for p in FOLDER.glob("*.py") if "\ndef main() -> " in p.read_text()]
    names = {name: place for place, name in enumerate(FIRST)}
    others = (p for p in runs if not p.name.startswith("run_"))
    return sorted(others, key=lambda p: (names.get(p.stem, len(names)), p.name))


def words_of(bench: Path, *, quick: bool, full: bool) -> list[str]:
    """Return the options of a bench; one that is not listed is told to do a single round."""
    if not quick:
        return [] if full else SHORTER.get(bench.stem, "").split()
    if bench.stem in QUICK:
        return QUICK[bench.stem].split()
    return ["--rounds", "1"] if '"--rounds"' in bench.read_text() else []


def run(bench: Path, words: Sequence[str], output: Path, limit_s: float) -> Outcome:
    """Run one bench; what it prints goes to ``output/NAME.log``."""
    log = output / f"{bench.stem}.log"
    # one core is what a rank has, and what processor time measures
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, str(bench), *words, "--output", str(output)]
    start = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=env, timeout=limit_s
            )
            problem = "" if done.returncode == 0 else f"exit code {done.returncode}, see {log}"
        except subprocess.TimeoutExpired:
            problem = f"took longer than {limit_s:.0f} s, see {log}"
    return Outcome(bench.stem, time.monotonic() - start, problem)


def run_each(
    chosen: Sequence[Path], output: Path, *, quick: bool, full: bool, limit_s: float
) -> list[Outcome]:
    """Run the benches in turn, with a line for each."""
    output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for number, bench in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {bench.stem} ...", end=" ", flush=True)
        for old in output.glob(f"{bench.stem}*.json"):
            old.unlink()  # what is there at the end is of this run
        done = run(bench, words_of(bench, quick=quick, full=full), output, limit_s)
        print(f"{done.seconds:.0f} s" + (f": FAILED, {done.problem}" if done.problem else ""))
        outcomes.append(done)
    return outcomes


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    names = [bench.stem for bench in benches()]
    parser.add_argument("--output", type=Path, required=True, help="Folder for all files.")
    parser.add_argument("--only", nargs="+", choices=names, help="Run these alone.")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="Tiny sizes: does everything run?")
    sizes.add_argument("--full", action="store_true", help="Largest sizes: hours, up to 8 GB.")
    return parser.parse_args(words)


def main() -> int:
    """Run the benches; the exit code is 1 if one failed."""
    args = parse()
    chosen = [bench for bench in benches() if args.only is None or bench.stem in args.only]
    limit_s = QUICK_LIMIT_S if args.quick else LIMIT_S * (4 if args.full else 1)
    outcomes = run_each(chosen, args.output, quick=args.quick, full=args.full, limit_s=limit_s)
    page = write_summary(args.output, outcomes, is_quick=args.quick)
    failed = [one.name for one in outcomes if one.problem]
    if failed:
        print(f"{page}; {len(failed)} of {len(outcomes)} benches failed: {', '.join(failed)}")
    else:
        print(f"{page}; {len(outcomes)} benches ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
