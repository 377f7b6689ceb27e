"""Where a training step of bench-S spends its time: torch's operations and compiled kernels.

torch's own profiler sees no compiled kernel. Here each operation is timed as it is dispatched, and
each kernel by Python's profiler, in two further steps; what neither sees is Python, autograd and
waiting, and is told as the rest.
"""

import argparse
import cProfile
import pstats
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.bench.step_ours import Size, Step, add_size_options, bench_s, size_of
from tools.bench.timing import alternate, report
from tools.bench.world import world_of_one

OURS = str(Path(__file__).resolve().parents[2] / "megatron")


class Place(NamedTuple):
    """An operation, and the line or function of ours that it is called from."""

    what: str
    where: str


class TimedOperations(TorchDispatchMode):
    """Adds up processor time and calls of every operation that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[Place, float] = defaultdict(float)
        self.calls: dict[Place, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Time one operation."""
        begun = time.process_time()
        result = func(*args, **(kwargs or {}))
        spent = time.process_time() - begun
        place = Place(str(func).removeprefix("aten."), _caller())
        self.seconds[place] += spent
        self.calls[place] += 1
        return result


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "autograd"
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(path: str) -> str:
    return path.removeprefix(OURS + "/").removeprefix("core/")


def kernel_times(step: Step) -> dict[Place, tuple[float, int]]:
    """Return seconds and calls of each function that calls compiled code, in one step."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(step)
    seconds: dict[Place, float] = defaultdict(float)
    times: dict[Place, int] = defaultdict(int)
    rows: dict[tuple[str, int, str], tuple[int, int, float, float, Any]]
    rows = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (path, _, name), (_, calls, own, _, _) in rows.items():
        if path.startswith(OURS) and _calls_compiled_code(path):
            place = Place(f"kernel {name}", _short(path))  # of all functions of that name
            seconds[place] += own
            times[place] = max(times[place], calls)
    return {place: (spent, times[place]) for place, spent in seconds.items()}


def _calls_compiled_code(path: str) -> bool:
    return "import ctypes" in Path(path).read_text(encoding="utf-8")


def table(dtype: str, size: Size, top: int) -> list[dict[str, object]]:
    """Return the ``top`` rows of a step and the rest of it."""
    step = Step(bench_s(size.hidden, bf16=dtype == "bf16"), size, "cpu")
    whole = alternate({"step": step}, rounds=3, warm_up=3)["step"].busy
    kernels = kernel_times(step)
    with torch.autograd.set_multithreading_enabled(False), TimedOperations() as operations:
        step()
    found = {place: (s, operations.calls[place]) for place, s in operations.seconds.items()}
    found |= kernels
    ordered = sorted(found.items(), key=lambda entry: -entry[1][0])
    rows: list[dict[str, object]] = [
        {
            "dtype": dtype,
            "milliseconds": 1e3 * seconds,
            "share": seconds / whole,
            "calls": calls,
            "what": place.what,
            "where": place.where,
        }
        for place, (seconds, calls) in ordered[:top]
    ]
    shown = sum(seconds for _, (seconds, _) in ordered[:top])
    others = sum(seconds for _, (seconds, _) in ordered[top:])
    rest = {"other rows": others, "rest": whole - shown - others, "step": whole}
    num_others = sum(calls for _, (_, calls) in ordered[top:])
    for name, seconds in rest.items():
        calls = num_others if name == "other rows" else None
        rows.append(
            {
                "dtype": dtype,
                "milliseconds": 1e3 * seconds,
                "share": seconds / whole,
                "calls": calls,
                "what": name,
                "where": "-",
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for profile_step.json.")
    parser.add_argument("--top", type=int, default=10, help="Rows of each dtype.")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add_size_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with world_of_one():
        for dtype in args.dtypes:
            rows += table(dtype, size_of(args), args.top)
    report("profile_step", rows, args.output)


if __name__ == "__main__":
    main()
