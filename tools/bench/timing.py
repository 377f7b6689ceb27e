"""Time alternatives side by side in one run: alternated call by call, medians and spread.

Machines are shared and noisy, so only ratios within one run mean anything.
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
    """Seconds of one call."""

    median: float
    low: float
    high: float


def alternate(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, Timing]:
    """Call each of ``calls`` in turn, ``rounds`` times after one warm-up, and time every call.

    On CUDA each call is bracketed by a synchronisation; on CPU the wall clock is used.

    Returns:
        Name -> median, lowest and highest seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {n: Timing(statistics.median(s), min(s), max(s)) for n, s in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, object]:
    """Describe the device, so that a figure is never quoted without it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def gemm_gflops(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Measure one matrix product [rows, inner] x [columns, inner]^T, in GFLOP/s: the limit."""
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = torch.randn(columns, inner, dtype=dtype, device=device)
    timing = alternate({"gemm": lambda: torch.nn.functional.linear(x, weight)}, rounds=9)["gemm"]
    return 2e-9 * rows * inner * columns / timing.median


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
    return f"{value:.3g}" if isinstance(value, float) else str(value)
