"""Two ranks on a core each against one rank on one core: efficiency, and where the rest goes.

A model shaped like bench-S, over gloo. *Strong*: the same global batch; *weak*: twice as many
samples on two ranks. One rank, two ranks on the same batch and two on twice as much take turns
step by step. Two runs that share nothing show what the machine itself takes from two cores at
once. Times are of the clock, so other work on the machine counts. ``--markdown FILE`` writes the
page and its picture.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from tools.bench.comm_clock import Spent, by_op, timed_collectives, transfer_and_waiting
from tools.bench.rank_processes import World, own_cores, worlds
from tools.bench.timed_run import TimedRun, options_of
from tools.bench.timing import report
from tools.bench.two_ranks_page import plot, write_page

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"expert_model_parallel_size": 2},
    "dp2": {},
    "dp2-sharded": {"use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
}
ALONE = "alone"
"""Two runs of one rank at the same time, which share nothing."""
DTYPES = ("fp32", "bf16")
RANKS = 2


class StepSeconds(NamedTuple):
    """One step of one rank."""

    wall: float
    thread: float
    """Processor time of the thread that computes."""
    process: float
    """Processor time of all threads, gloo's included."""
    optimizer: float
    """Of ``wall``, what goes over weights: zeroing of gradients, norm, update."""
    calls: list[Spent]

    @property
    def own(self) -> float:
        """Seconds outside collectives and messages."""
        return self.wall - sum(one.seconds for one in self.calls)


class Round(NamedTuple):
    """One rank, and two on the same and on twice as many samples."""

    one: StepSeconds
    strong: list[StepSeconds]
    weak: list[StepSeconds]


def build(kept: dict[str, Any], options: dict[str, Any]) -> int:
    """Make the run of this rank; return its parameters."""
    kept["run"] = TimedRun(options, clock=time.perf_counter)
    return kept["run"].num_parameters


def drop(kept: dict[str, Any]) -> None:
    """Forget the run."""
    kept.clear()
    gc.collect()


def step(kept: dict[str, Any], samples: int) -> StepSeconds:
    """Train one step on ``samples`` of all ranks."""
    run: TimedRun = kept["run"]
    run.set_global_batch(samples)
    dist.barrier()
    with timed_collectives() as calls:
        thread, process = time.thread_time(), time.process_time()
        seconds = run.step()
        thread, process = time.thread_time() - thread, time.process_time() - process
    over_weights = seconds["zero"] + seconds["optimizer"]
    return StepSeconds(seconds["step"], thread, process, over_weights, calls)


def options(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Return the options of the model and of one rank's batch."""
    shape = options_of(
        hidden=args.hidden_size,
        layers=args.num_layers,
        sequence=args.seq_length,
        experts=8,
        vocabulary=args.vocab_size,
        bf16=dtype == "bf16",
    )
    batch = {"micro_batch_size": args.micro_batch_size, "global_batch_size": args.global_batch_size}
    return shape | batch


def rounds_of(
    layout: str, one: World, two: World, args: argparse.Namespace, dtype: str
) -> Iterator[Round]:
    """Yield timed rounds; ``one`` has built its run."""
    two.do(build, options(args, dtype) | LAYOUTS[layout])
    samples = args.global_batch_size
    for turn in range(args.warm_up + args.rounds):
        found = Round(
            one.do(step, samples)[0], two.do(step, samples), two.do(step, RANKS * samples)
        )
        if turn >= args.warm_up:
            yield found
    two.do(drop)


def rounds_alone(one: World, other: World, args: argparse.Namespace) -> Iterator[Round]:
    """Yield rounds of one run, and of two at the same time; both have built theirs."""
    for turn in range(args.warm_up + args.rounds):
        (alone,) = one.do(step, args.global_batch_size)
        for world in (one, other):
            world.start(step, args.global_batch_size)
        both = [*one.answers(), *other.answers()]
        if turn >= args.warm_up:
            yield Round(alone, [], both)


def rows_of(layout: str, dtype: str, rounds: Sequence[Round]) -> list[dict[str, object]]:
    """Return a row for strong and one for weak scaling, where there are steps of it.

    Parts are shares of the step of two ranks, means over ranks and medians over rounds:
    efficiency, extra, transfer and waiting add up to a whole step, less what the faster rank ends
    before the other.
    """
    found: list[dict[str, object]] = []
    for scaling, share in (("strong", 1 / RANKS), ("weak", 1.0)):
        pairs = [(r.one, getattr(r, scaling)) for r in rounds if getattr(r, scaling)]
        if not pairs:
            continue
        parts = [parts_of(one, ranks, share) for one, ranks in pairs]
        walls = [max(rank.wall for rank in ranks) for _, ranks in pairs]
        calls = by_op(pairs[-1][1][0].calls)
        found.append(
            {
                "layout": layout,
                "dtype": dtype,
                "scaling": scaling,
                "one_rank_ms": 1e3 * statistics.median(one.wall for one, _ in pairs),
                "step_ms": 1e3 * statistics.median(walls),
                **{key: statistics.median(part[key] for part in parts) for key in parts[0]},
                "calls": sum(count for count, _, _ in calls.values()),
                "mib": sum(size for _, size, _ in calls.values()) / 2**20,
                "ops": {op: [n, size, 1e3 * spent] for op, (n, size, spent) in calls.items()},
            }
        )
    return found


def parts_of(one: StepSeconds, ranks: Sequence[StepSeconds], share: float) -> dict[str, float]:
    """Split the mean step of ``ranks``; ``share`` of the work of ``one`` is that of a rank."""
    wall = max(rank.wall for rank in ranks)
    own = statistics.mean(rank.own for rank in ranks)
    talk = transfer_and_waiting([rank.calls for rank in ranks])
    transfer, waiting = (statistics.mean(column) for column in zip(*talk, strict=True))
    seconds = {
        "efficiency": share * one.wall,
        "extra": own - share * one.wall,
        "transfer": transfer,
        "waiting": waiting,
        "over_weights": statistics.mean(rank.optimizer for rank in ranks),
        "gloo_threads": statistics.mean(rank.process - rank.thread for rank in ranks),
    }
    return {key: spent / wall for key, spent in seconds.items()}


def bubble(layout: str, microbatches: int) -> float | None:
    """Return the share of a step that a stage of a pipeline must stand idle; None without one."""
    stages = LAYOUTS.get(layout, {}).get("pipeline_model_parallel_size", 1)
    return (stages - 1) / (microbatches + stages - 1) if stages > 1 else None


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Return the rows of all layouts and dtypes."""
    cores = own_cores()
    if len(cores) < RANKS:
        raise SystemExit(f"two ranks on a core each need two cores; this process has {cores}")
    rows: list[dict[str, object]] = []
    with worlds([cores[:1], cores[1:2], cores[:2]]) as (one, other, two):
        for dtype in args.dtypes:
            for world in (one, other):
                world.do(build, options(args, dtype))
            rows += rows_of(ALONE, dtype, list(rounds_alone(one, other, args)))
            other.do(drop)
            for layout in args.layouts:
                rows += rows_of(layout, dtype, list(rounds_of(layout, one, two, args, dtype)))
            one.do(drop)
    for row in rows:
        samples = args.global_batch_size * (RANKS if row["scaling"] == "weak" else 1)
        row["bubble"] = bubble(str(row["layout"]), samples // args.micro_batch_size)
    return rows


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--hidden-size", type=int, default=512, help="Width of a token.")
    parser.add_argument("--num-layers", type=int, default=4, help="Layers of the model.")
    parser.add_argument("--vocab-size", type=int, default=8192, help="Tokens there are.")
    parser.add_argument("--seq-length", type=int, default=512, help="Tokens of a sample.")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="Of a rank.")
    parser.add_argument("--global-batch-size", type=int, default=8, help="Samples of one rank.")
    parser.add_argument("--rounds", type=int, default=2, help="Timed rounds.")
    parser.add_argument("--warm-up", type=int, default=1, help="Untimed rounds before.")
    parser.add_argument("--output", type=Path, help="Folder for two_ranks.json and .png.")
    parser.add_argument("--markdown", type=Path, help="Page to write, a picture beside it.")
    return parser.parse_args(words)


def main() -> None:
    """Measure and print the table."""
    args = parse()
    torch.set_num_threads(1)
    rows = measure(args)
    report("two_ranks", rows, args.output)
    if args.output is not None:
        plot(rows, args.output / "two_ranks.png")
    if args.markdown is not None:
        write_page(args.markdown, rows, args)


if __name__ == "__main__":
    main()
