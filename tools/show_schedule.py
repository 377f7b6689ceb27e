"""Draw a pipeline schedule as text and SVG, with its idle time and the activations it keeps.

    python tools/show_schedule.py --schedule 1f1b --pp 4 --vpp 2 --microbatches 8
    python tools/show_schedule.py --compare --pp 8 --microbatches 32 --costs 1,1.2,0.8,0.1

Nothing is executed: the lists that training would walk are played on a clock.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.schedule_plan import SCHEDULES, build_schedule
from megatron.core.pipeline_parallel.schedule_simulator import Costs, simulate
from megatron.core.pipeline_parallel.schedule_step import Schedule
from megatron.core.pipeline_parallel.schedule_transfers import with_transfers
from tools.preprocessing import command_line
from tools.schedules.compare import comparison
from tools.schedules.svg import svg_page
from tools.schedules.text import drawing, rank_table

MAX_FORWARDS = 50_000
"""Of all ranks; more would take minutes, and nobody could read them."""
MIN_WIDTH = 40


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    if args.compare:
        print(comparison(_compared(args), args.costs, sends=args.sends))
        return
    schedule = _build(args.schedule or "1f1b", args, args.vpp)
    _check(args, schedule)
    timeline = simulate(schedule, args.costs, sends=args.sends, stage_shares=args.stage_shares)
    print(drawing(schedule, timeline, width=args.width))
    print()
    print(rank_table(schedule, timeline))
    for rank in args.actions:
        print(f"\nrank {rank} walks:")
        print("\n".join(f"  {action}" for action in with_transfers(schedule)[rank]))
    if args.svg:
        Path(args.svg).write_text(svg_page(schedule, timeline), encoding="utf-8")
        print(f"\nwrote {args.svg}")


def _build(name: str, args: argparse.Namespace, vpp: int | None) -> Schedule:
    chunks = 2 if name == "dualpipev" else vpp or 1
    if args.pp * args.microbatches * chunks > MAX_FORWARDS:
        raise ConfigError(
            f"--pp {args.pp} x --microbatches {args.microbatches} x {chunks} chunk(s) are more "
            f"than {MAX_FORWARDS} forwards: draw fewer"
        )
    return build_schedule(
        name, pp=args.pp, num_microbatches=args.microbatches, vpp=vpp, group_size=args.group_size
    )


def _check(args: argparse.Namespace, schedule: Schedule) -> None:
    shares = args.stage_shares
    if shares is not None and len(shares) != schedule.num_stages:
        raise ConfigError(
            f"--stage-shares has {len(shares)} number(s), but {schedule.pp} ranks with "
            f"{schedule.chunks} chunk(s) make {schedule.num_stages} stages"
        )
    for rank in args.actions:
        if not 0 <= rank < schedule.pp:
            raise ConfigError(f"--actions {rank}: ranks are 0 to {schedule.pp - 1}")


def _compared(args: argparse.Namespace) -> list[Schedule]:
    of_one = {
        "--schedule": args.schedule,
        "--svg": args.svg,
        "--stage-shares": args.stage_shares,
        "--actions": args.actions,
        "--group-size": args.group_size,
    }
    ConfigError.raise_if_any(
        f"{flag} is for one schedule: leave out --compare" for flag, v in of_one.items() if v
    )
    vpp = {"interleaved": args.vpp or 2}
    return [_build(name, args, vpp.get(name)) for name in SCHEDULES]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser(
        "Draw a pipeline schedule: when each rank computes what, how long it waits, what it keeps."
    )
    add, positive = parser.add_argument, command_line.positive
    add("--schedule", choices=SCHEDULES, help="1f1b if not given; with --vpp it is interleaved.")
    add("--pp", type=positive, required=True, metavar="N", help="Pipeline ranks.")
    add("--vpp", type=positive, metavar="N", help="Chunks that each rank holds (virtual stages).")
    add("--microbatches", type=positive, required=True, metavar="N",
        help="Microbatches of one step of training.")  # fmt: skip
    add("--group-size", type=positive, metavar="N",
        help="Microbatches that pass a chunk before the next one's turn; --pp if not given."
    )  # fmt: skip
    add("--costs", type=_costs, default=Costs(), metavar="F,I,W[,COMM]",
        help="Times of one microbatch through a rank's layers: forward, gradient of inputs, "
        "gradient of weights; and of a message. 1,1,1,0 if not given.")  # fmt: skip
    add("--stage-shares", type=_shares, metavar="S,S,...",
        help="What each stage costs, in parts of a rank's layers, in the order of the model."
    )  # fmt: skip
    add("--sends", choices=("buffered", "blocking"), default="buffered",
        help="Whether a sender goes on at once, or stands until its message is over.")  # fmt: skip
    add("--compare", action="store_true", help="A table of all schedules instead of a drawing.")
    add("--actions", type=int, nargs="+", default=[], metavar="RANK",
        help="List steps, sends and receives of these ranks in order.")  # fmt: skip
    add("--svg", metavar="PATH", help="Write the drawing to this file too.")
    add("--width", type=_width, default=max(shutil.get_terminal_size((120, 24)).columns, 40),
        metavar="N", help="Columns of the text.")  # fmt: skip
    return parser.parse_tool_args(argv)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers such as 1,1.5,0.5"
        ) from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: times are numbers of at least 0")
    return numbers


def _shares(text: str) -> list[float]:
    shares = _numbers(text)
    if 0 in shares:
        raise argparse.ArgumentTypeError(f"{text!r}: shares must be more than 0")
    return shares


def _costs(text: str) -> Costs:
    numbers = _numbers(text)
    if len(numbers) not in (3, 4) or 0 in numbers[:3]:
        raise argparse.ArgumentTypeError(f"{text!r} must be F,I,W or F,I,W,COMM with F, I, W > 0")
    forward, input_grad, weight_grad, comm = [*numbers, 0.0][:4]
    return Costs(forward=forward, input_grad=input_grad, weight_grad=weight_grad, comm=comm)


def _width(text: str) -> int:
    number = int(text)
    if number < MIN_WIDTH:
        raise argparse.ArgumentTypeError(f"{text} columns are too few: at least {MIN_WIDTH}")
    return number


if __name__ == "__main__":
    command_line.run_tool(main)
