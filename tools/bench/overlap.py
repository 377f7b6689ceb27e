"""Step time with overlap and without, over a link that is slow: how much of it is hidden.

Two ranks on this machine. The collectives are real and land late (``slow_group.py``), computation
sleeps for a known time (``overlap_cases.py``) but in the last case; so the figures are those of
the order of events, hardly of the machine. Results with and without are compared to the bit.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from tools.bench.overlap_cases import (
    Case,
    Times,
    expert_all_to_all,
    gradient_reduce,
    parameter_gather,
)
from tools.bench.overlap_models import everything, other_microbatch
from tools.bench.slow_group import BACKEND, LINK, register
from tools.bench.timing import report
from tools.layouts.ranks import run_ranks

RANKS = 2


def cases(times: Times, hidden_size: int) -> Iterator[tuple[str, Case]]:
    """Yield (what is overlapped, its case)."""
    yield "gradient reduce", gradient_reduce(times, layers=6, width=64)
    yield "parameter gather", parameter_gather(times, layers=6, width=64)
    yield "expert all-to-all, shared experts", expert_all_to_all(times, tokens=64, width=16)
    yield "expert all-to-all, other microbatch", other_microbatch(times)
    yield "first three, real computation", everything(hidden_size=hidden_size)


def seconds_of(case: Case, rounds: int) -> dict[str, float]:
    """Return the seconds of the fastest step: compute only, plain, overlapped; turn by turn.

    The fastest, for other load on the machine only adds.
    """
    found: dict[str, list[float]] = {"compute": [], "plain": [], "overlap": []}
    for _ in range(rounds):
        for name, spent in found.items():
            LINK.events.clear()
            LINK.seconds_per_byte = {} if name == "compute" else case.seconds_per_byte
            case.step(name == "overlap")  # leaves its gathers to the next one, which pays for them
            dist.barrier()
            start = time.perf_counter()
            case.step(name == "overlap")
            spent.append(time.perf_counter() - start)
        LINK.seconds_per_byte = {}
        case.step(True)
        case.step(True)  # now both have made the same steps
    return {name: min(spent) for name, spent in found.items()}


def row_of(what: str, case: Case, rounds: int) -> dict[str, object]:
    """Time one case on this rank.

    Raises:
        AssertionError: Results with overlap are not those without, to the bit.
    """
    spent = seconds_of(case, rounds)
    plain, overlapped = case.result(False), case.result(True)
    assert plain, f"{what}: nothing was computed"
    for one, other in zip(plain, overlapped, strict=True):
        assert torch.equal(one, other), f"{what}: overlap changes the result"
    exposed = max(spent["plain"] - spent["compute"], 1e-9)
    return {
        "what": what,
        "compute_ms": 1e3 * spent["compute"],
        "no_overlap_ms": 1e3 * spent["plain"],
        "overlap_ms": 1e3 * spent["overlap"],
        "share_hidden": (spent["plain"] - spent["overlap"]) / exposed,
        "same_bits": True,
    }


def _measure(times: Times, hidden_size: int, rounds: int, path: Path) -> None:
    rows = [row_of(what, case, rounds) for what, case in cases(times, hidden_size)]
    if dist.get_rank() == 0:
        torch.save(rows, path)


def main() -> int:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--compute-ms", type=float, default=20.0, help="Forward of a layer.")
    parser.add_argument("--transfer-ms", type=float, default=20.0, help="One transfer.")
    parser.add_argument("--hidden-size", type=int, default=128, help="Of the model that computes.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed steps of each.")
    parser.add_argument("--output", type=Path, help="Folder for the JSON file.")
    args = parser.parse_args()
    register()
    times = Times(args.compute_ms / 1e3, args.transfer_ms / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.pt"
        run_ranks(_measure, RANKS, times, args.hidden_size, args.rounds, path, backend=BACKEND)
        rows = torch.load(path, weights_only=False)
    report("overlap", rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
