"""Rows to their experts and back, forward and backward, by each dispatcher on 1 and 2 ranks.

The limit is copying: every row is read and written once on the way out, and once on the way back,
in forward and in backward, at the rate at which this machine copies a tensor of that size; on 2
ranks gloo's copies come on top, and what ranks wait for each other. Experts do nothing; which ones
a token goes to is random.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from megatron.core.parallel_layout import ParallelLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllDedupTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEHierarchicalTokenDispatcher,
)
from tools.bench.timing import alternate, report
from tools.layouts.ranks import run_ranks

DISPATCHERS = {
    "allgather": MoEAllGatherTokenDispatcher,
    "alltoall": MoEAlltoAllTokenDispatcher,
    "alltoall_dedup": MoEAlltoAllDedupTokenDispatcher,
    "alltoall_hierarchical": MoEHierarchicalTokenDispatcher,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trip:
    """Tokens of one rank, and the way to the experts and back."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(dist.get_rank())
        shape = (args.tokens, args.hidden_size)
        self.tokens = torch.randn(shape, generator=rng).to(dtype).requires_grad_()
        scores = torch.rand(args.tokens, args.num_experts, generator=rng)
        chosen = scores.topk(args.topk, dim=1).indices
        self.routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        self.probs = (scores * self.routing_map).requires_grad_()
        self.grad = torch.randn(shape, generator=rng).to(dtype)
        self.rows = self.tokens.detach().repeat(args.topk, 1)
        self.room = torch.empty_like(self.rows)

    def by(
        self, dispatcher: type, args: argparse.Namespace, groups: ProcessGroupCollection
    ) -> Callable[[], None]:
        """Return the trip, there and back and backward, by ``dispatcher``."""
        way = dispatcher(args.num_experts, pg_collection=groups, topk=args.topk)

        def go() -> None:
            self.tokens.grad = self.probs.grad = None
            sent = way.token_permutation(self.tokens, self.probs, self.routing_map)
            out = way.token_unpermutation(sent.hidden_states, sent)
            torch.autograd.backward((out, sent.probs), (self.grad, torch.ones_like(sent.probs)))

        return go

    def copy(self) -> None:
        """Copy as many rows as all four ways have."""
        for _ in range(4):
            self.room.copy_(self.rows)

    def gigabytes(self) -> float:
        """Return what ``copy`` reads and writes, in 10^9 bytes."""
        return 8e-9 * self.rows.numel() * self.rows.element_size()


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Time every dispatcher on this world; rank 0 writes the rows."""
    ranks = dist.get_world_size()
    layout = ParallelLayout(world_size=ranks, ep=ranks, node_size=1)
    groups = ProcessGroupCollection.create(layout)
    rows: list[dict[str, object]] = []
    for dtype in args.dtypes:
        trip = Trip(args, DTYPES[dtype])
        calls: dict[str, Callable[[], object]] = {"copying": trip.copy}
        for name in args.dispatchers:
            calls[name] = trip.by(DISPATCHERS[name], args, groups)
        timings = alternate(calls, args.rounds, before=dist.barrier, warm_up=2)
        limit = timings["copying"]
        for name, timing in timings.items():
            rows.append(
                {
                    "ranks": ranks,
                    "dtype": dtype,
                    "what": name,
                    "ms": 1e3 * timing.busy,
                    "wall_ms": 1e3 * timing.median,
                    "low_ms": 1e3 * timing.low,
                    "high_ms": 1e3 * timing.high,
                    "gigabytes_per_s": trip.gigabytes() / timing.busy,
                    "share_of_limit": limit.busy / timing.busy,
                }
            )
    if dist.get_rank() == 0:
        torch.save(rows, folder / "rows.pt")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=2048, help="Of each rank.")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-experts", type=int, default=8, help="On all ranks.")
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    names = list(DISPATCHERS)
    parser.add_argument("--dispatchers", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=9, help="Timed calls of each.")
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON file.")
    return parser.parse_args(words)


def main() -> None:
    """Print one table for all."""
    args = parse()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(measure, ranks, args, Path(folder))
            rows += torch.load(Path(folder) / "rows.pt")
    report("dispatcher", rows, args.output)


if __name__ == "__main__":
    main()
