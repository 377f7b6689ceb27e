"""Saving and loading against torch.save and torch.load of the same bytes, in one run.

Two ranks each hold half of the state, in tensors of the sizes that experts have. A save ends when
its bytes are on the disk (fsync) on both sides; a load ends in tensors that exist already. The
background save is timed as training sees it: the copy, beside one plain copy of the same memory.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.serialization import read_tensors
from megatron.core.dist_checkpointing.staging import Staging
from megatron.core.dist_checkpointing.store import (
    CheckpointContent,
    open_checkpoint,
    write_checkpoint,
)
from tools.bench.timing import report
from tools.layouts.ranks import run_ranks

MIB = 2**20
STATES = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


class Rank:
    """One rank's share of the state, and the calls that are timed."""

    def __init__(self, folder: Path, mib: int, tensor_mib: float) -> None:
        self.group, self.number = dist.group.WORLD, dist.get_rank()
        self.folder, self.own = folder, folder / f"rank_{self.number}.pt"
        numbers = int(tensor_mib * MIB) // 4
        count = max(1, mib * MIB // (4 * numbers * len(STATES)))
        self.tensors = {
            f"{state}.experts.local_experts.{count * self.number + expert}.weight": torch.rand(
                numbers
            )
            for state in STATES
            for expert in range(count)
        }
        self.staging = Staging(self.group)
        self.copies: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's share."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def forget(self) -> None:
        """Delete what was written; untimed, so that both sides write new files."""
        dist.barrier()
        self.own.unlink(missing_ok=True)
        if self.number == 0:
            shutil.rmtree(self.folder / "ours", ignore_errors=True)

    def save(self) -> None:
        """Write a checkpoint."""
        write_checkpoint(self.folder / "ours", 1, self._content(), self.group)

    def load(self) -> None:
        """Open the checkpoint and read it."""
        opened = open_checkpoint(self.folder / "ours", self.group)
        assert opened is not None, "nothing was saved"
        prefixes = ("model.", "optimizer.")
        read_tensors(opened.path, self.tensors, self.group, prefixes=prefixes)

    def torch_save(self) -> None:
        """Write the same bytes with torch, one file a rank."""
        with self.own.open("wb") as stream:
            torch.save(self.tensors, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def torch_load(self) -> None:
        """Read the same bytes with torch."""
        torch.load(self.own, weights_only=True)

    def stage(self) -> None:
        """Do what a background save does while training waits."""
        self.staging.copy(self.tensors)

    def copy(self) -> None:
        """Copy the same memory once, into memory that is there already."""
        if not self.copies:
            self.copies = [torch.empty_like(tensor) for tensor in self.tensors.values()]
        for target, source in zip(self.copies, self.tensors.values(), strict=True):
            target.copy_(source)

    def _content(self) -> CheckpointContent:
        return CheckpointContent(tensors=self.tensors, common={})


def seconds_of(call: Callable[[], object]) -> float:
    """Return the time until the slowest rank has made ``call``."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    return max(gather(time.perf_counter() - begin, dist.group.WORLD))


def extra_memory(call: Callable[[], object]) -> float:
    """Return by how many MiB this process grew at most during ``call``; Linux only."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")

    def kib(what: str) -> int:
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith(what)).split()[1])

    clear.write_text("5")  # the peak begins anew
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024


def measure(rank: Rank, rounds: int) -> list[dict[str, object]]:
    """Time the pairs in turn; the ratio of each round counts, and of them the median."""
    pairs = {
        "save": (rank.save, rank.torch_save),
        "load": (rank.load, rank.torch_load),
        "async stall": (rank.stage, rank.copy),
    }
    rows: list[dict[str, object]] = []
    for name, (ours, theirs) in pairs.items():
        extra = extra_memory(ours)
        seconds_of(theirs)
        times = []
        for _ in range(rounds):
            if name == "save":
                rank.forget()
            times.append((seconds_of(ours), seconds_of(theirs)))
        ratios = sorted(other / own for own, other in times)
        total = sum(gather(rank.nbytes, rank.group))
        own, other = (statistics.median(side) for side in zip(*times, strict=True))
        rows.append(
            {
                "what": name,
                "state_mib": total / MIB,
                "seconds": own,
                "torch_seconds": other,
                "mib_per_s": total / MIB / own,
                "rate_share": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
                "extra_mib_a_rank": max(gather(extra, rank.group)),
            }
        )
    return rows


def run(folder: str, args: argparse.Namespace) -> None:
    """Do one rank's part; the first rank prints the table."""
    torch.set_num_threads(1)
    rank = Rank(Path(folder), args.mib // args.ranks, args.tensor_mib)
    rows = measure(rank, args.rounds)
    if rank.number == 0:
        report("checkpoint", rows, args.output)


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for checkpoint.json.")
    parser.add_argument("--mib", type=int, default=2048, help="State of all ranks together.")
    parser.add_argument("--tensor-mib", type=float, default=8.0, help="Size of one tensor.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="Where to write; else a temporary folder."
    )
    args = parser.parse_args()
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
        run_ranks(run, args.ranks, folder, args)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
