"""Time alternatives side by side in one run: alternated call by call, medians and spread.

Machines are shared and noisy: only ratios within one run mean anything. On a CPU the time is that
of the process on its cores, which others' load moves less than it moves the clock.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one call by the wall clock, and of processor time of all threads."""

    median: float
    low: float
    high: float
    cpu: float
    """Median of processor time."""
    cpu_low: float
    cpu_high: float

    @property
    def busy(self) -> float:
        """What is to be compared: processor time of one thread, wall clock of several or CUDA."""
        return self.cpu if _counts_processor_time() else self.median

    @property
    def spread(self) -> tuple[float, float]:
        """Least and most of what ``busy`` is the median of."""
        if _counts_processor_time():
            return self.cpu_low, self.cpu_high
        return self.low, self.high


def _counts_processor_time() -> bool:
    return not torch.cuda.is_available() and torch.get_num_threads() == 1


def busy_clock() -> float:
    """Return the seconds of the clock that ``Timing.busy`` goes by; on CUDA all work is done."""
    _synchronize()
    return time.process_time() if _counts_processor_time() else time.perf_counter()


def alternate(
    calls: dict[str, Callable[[], object]],
    rounds: int = 7,
    *,
    before: Callable[[], object] | None = None,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Call each of ``calls`` in turn, ``rounds`` times after ``warm_up`` rounds, and time each.

    On CUDA each call is bracketed by a synchronisation.

    Args:
        calls: By name.
        rounds: Timed calls of each.
        before: Called once before each round, untimed; makes new inputs, say.
        warm_up: Untimed rounds.

    Returns:
        Name -> timing.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        if before is not None:
            before()
        for name, call in calls.items():
            _synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            _synchronize()
            if turn >= warm_up:
                spent = (time.perf_counter() - wall, time.process_time() - cpu)
                seconds[name].append(spent)
    return {name: _timing(spent) for name, spent in seconds.items()}


def _timing(spent: list[tuple[float, float]]) -> Timing:
    wall, cpu = zip(*spent, strict=True)
    middle = statistics.median
    return Timing(middle(wall), min(wall), max(wall), middle(cpu), min(cpu), max(cpu))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, object]:
    """Describe the device, so that a figure is never quoted without it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = _cpu_facts()
    kinds = [kind for kind in ("avx512_bf16", "amx_bf16") if kind in facts.get("flags", "").split()]
    return {
        "device": gpu or facts.get("model name") or platform.processor() or platform.machine(),
        "cpu_capability": " ".join([torch.backends.cpu.get_cpu_capability(), *kinds]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpu_facts() -> dict[str, str]:
    """Return what Linux tells of the first core; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def gemm_gflops(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Measure one matrix product [rows, inner] x [columns, inner]^T, in GFLOP/s: the limit."""
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = torch.randn(columns, inner, dtype=dtype, device=device)
    timing = alternate({"gemm": lambda: torch.nn.functional.linear(x, weight)}, rounds=9)["gemm"]
    return 2e-9 * rows * inner * columns / timing.busy


def report(name: str, rows: list[dict[str, object]], output: Path | None) -> None:
    """Print ``rows`` as a table and write them, with the machine, to ``output/name.json``."""
    print(f"\n{name}: {machine()}")
    if rows:
        widths = [max(len(k), *(len(_cell(r.get(k))) for r in rows)) for k in rows[0]]
        print("  ".join(k.rjust(w) for k, w in zip(rows[0], widths, strict=True)))
        for row in rows:
            print(
                "  ".join(_cell(row.get(k)).rjust(w) for k, w in zip(rows[0], widths, strict=True))
            )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "rows": rows}, indent=2)
        (output / f"{name}.json").write_text(text + "\n")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
