"""Seconds until something happens: import of torch, help pages, the first finished training step.

Fresh processes, in turn; medians. A run is that of the quickstart's model, on data made for it by
the quickstart's tools; its log says what the time went to. Targets are those of docs/startup.md.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.core.cpu_kernels.build import FOLDER_VARIABLE
from tools.bench.timing import report

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "quickstart" / "tiny_moe.yaml"
STEP = "first step done"
HELP_TARGET_S = 1.0
STEP_TARGETS_S = {1: 6.0, 4: 10.0}
"""Seconds to the first step, by number of ranks."""


class Spent(NamedTuple):
    """One process, from its launch."""

    wall: float
    """Seconds until it ended, or until the line that was waited for."""
    processor: float
    """Processor time of all its processes until they ended; with a line, of rank 0 until then."""
    phases: dict[str, float]
    """Seconds by phase, as the log says."""


def until_end(words: Sequence[str]) -> Spent:
    """Run a command and measure it whole."""
    begin, before = time.perf_counter(), _children_seconds()
    done = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wall = time.perf_counter() - begin
    _refuse_failure(done.returncode, words, done.stderr)
    return Spent(wall, _children_seconds() - before, {})


def until_first_step(words: Sequence[str]) -> Spent:
    """Run a training command and measure it until the log says that a step is done."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None, "a pipe was asked for"
    wall, line, lines = 0.0, "", []
    for text in process.stdout:
        lines.append(text)
        if STEP in text and not line:
            wall, line = time.perf_counter() - begin, text
    _refuse_failure(process.wait(), words, "".join(lines))
    assert line, f"no step in the log of {words}"
    return spent_of(line, wall)


def spent_of(line: str, wall: float) -> Spent:
    """Return what the line of ``StartClock`` says, and the ``wall`` seconds measured outside."""
    processor = re.search(r"([\d.]+) s of them", line)
    assert processor is not None, line
    phases = re.findall(r"([a-z ]+) (\d+\.\d+)(?:,|$)", line.rpartition(": ")[2].strip())
    return Spent(wall, float(processor[1]), {name.strip(): float(s) for name, s in phases})


def _refuse_failure(code: int, words: Sequence[str], said: str) -> None:
    assert code == 0, f"{' '.join(map(str, words))} failed:\n{said[-2000:]}"


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def training(ranks: int, data: Sequence[str], folder: Path) -> list[str]:
    """Return the command that trains one step of the quickstart's model on so many ranks."""
    flags = f"--yaml-cfg {MODEL} --exit-interval 1 --log-dir {folder / 'log'}".split()
    flags += ["--expert-model-parallel-size", str(ranks)]
    if ranks > 2:
        flags += ["--micro-batch-size", str(16 // ranks)]
    begin = [sys.executable]
    if ranks > 1:
        begin += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*begin, str(ROOT / "pretrain_gpt.py"), *flags, *data]


def make_data(folder: Path) -> list[str]:
    """Return flags of data that the quickstart's tools make in ``folder``."""
    corpus, model, prefix = (folder / name for name in ("c.jsonl", "t.model", "data"))
    tokenizer = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {model}"
    for line in (
        f"make_stdlib_corpus.py --output {corpus}",
        f"train_tokenizer.py --input {corpus} --vocab-size 8192 --output {model}",
        f"preprocess_data.py --input {corpus} --output-prefix {prefix} --append-eod {tokenizer}",
    ):
        tool, *flags = line.split()
        until_end([sys.executable, str(ROOT / "tools" / tool), *flags])
    return ["--data-path", str(prefix), "--data-cache-path", str(folder / "cache")]


def tools() -> list[Path]:
    """Return every tool that a user calls."""
    found = [*(ROOT / "tools").glob("*.py"), *(ROOT / "tools" / "checkpoint").glob("*.py")]
    return sorted(path for path in found if "__main__" in path.read_text())


def loads_torch(words: Sequence[str]) -> bool:
    """Whether a command of Python imports torch."""
    done = subprocess.run(
        [words[0], "-X", "importtime", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    return any(line.endswith("| torch") for line in done.stderr.splitlines())


def cases(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Return name -> command; those of training have a number of ranks in their name."""
    python = sys.executable
    found = {
        "python": [python, "-c", "pass"],
        "import torch": [python, "-c", "import torch"],
        "pretrain_gpt.py --help": [python, str(ROOT / "pretrain_gpt.py"), "--help"],
    }
    if args.tools:
        found |= {
            f"{tool.relative_to(ROOT)} --help": [python, str(tool), "--help"] for tool in tools()
        }
    if not args.ranks:
        return found
    data = ["--mock-data", "--vocab-size", "8191"] if args.mock_data else make_data(folder)
    for ranks in args.ranks:
        words = training(ranks, data, folder)
        found[f"first step, ranks: {ranks}"] = words
        found[f"first step, kernels compiled anew, ranks: {ranks}"] = [
            "env",
            f"{FOLDER_VARIABLE}=",  # none are kept
            *words,
        ]
    return found


def rows_of(name: str, words: Sequence[str], all_spent: Sequence[Spent]) -> list[dict[str, object]]:
    """Return the row of a case, and one for each of its phases."""
    walls = [spent.wall for spent in all_spent]
    processor = statistics.median(spent.processor for spent in all_spent)
    target: float | None = None
    if name.endswith("--help") and not loads_torch(words):
        target = HELP_TARGET_S
    elif name.startswith("first step"):
        target = STEP_TARGETS_S.get(int(name.split()[-1]))
    rows: list[dict[str, object]] = [
        {
            "what": name,
            "wall_s": statistics.median(walls),
            "low_s": min(walls),
            "high_s": max(walls),
            "processor_s": processor,
            "target_s": target,
        }
    ]
    for phase in all_spent[-1].phases:
        seconds = [spent.phases.get(phase, 0.0) for spent in all_spent]
        rows.append({"what": f"- {phase}", "wall_s": statistics.median(seconds)})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--output", type=Path, default=None, help="Folder for startup.json.")
    add("--rounds", type=int, default=5, help="Fresh processes of each.")
    add("--ranks", type=int, nargs="*", default=[1, 4], help="Ranks of the runs that train.")
    add("--mock-data", action="store_true", help="Train on made-up tokens: no tools, no index.")
    add("--no-tools", dest="tools", action="store_false", help="Leave the tools' help pages out.")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        commands = cases(args, Path(scratch))
        spent: dict[str, list[Spent]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, words in commands.items():
                measure = until_first_step if name.startswith("first step") else until_end
                spent[name].append(measure(words))
        rows = [
            row for name, words in commands.items() for row in rows_of(name, words, spent[name])
        ]
    report("startup", rows, args.output)


if __name__ == "__main__":
    main()
