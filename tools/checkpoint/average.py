"""The weighted mean of checkpoints of one model, such as the last of a run: another checkpoint.

Sources: Izmailov et al. 2018 (arXiv:1803.05407), along a run; Wortsman et al. 2022
(arXiv:2203.05482), of several runs that began with the same weights.
"""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else it hides Python's own inspect

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.core.errors import CheckpointError, ConfigError
from tools.checkpoint.byte_counts import size_text
from tools.checkpoint.expert_plans import numbers
from tools.preprocessing import command_line

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    from tools.checkpoint import mean, rewrite

    sources = _sources(args)
    if len(sources) < 2:
        raise ConfigError("a mean needs two checkpoints or more; give --last N, or --load again")
    weights = _weights(args, len(sources))
    mean.refuse_others(sources)
    if args.keep_optim:
        _refuse_optim(sources)
    words = " ".join(sys.argv[1:] if argv is None else argv)
    common = mean.mean_common(sources, with_optim=args.keep_optim)
    tensors = mean.mean_tensors(sources, weights, with_optim=args.keep_optim)
    path, size = rewrite.write(
        sources[-1], args.save, tensors, common=rewrite.with_history(common, f"average {words}")
    )
    for source, weight in zip(sources, weights, strict=True):
        print(f"{weight:.6f} x {source.path}")
    print(f"wrote {path} ({size_text(size)})")
    if not args.keep_optim:
        print(f"to train on: --load {args.save} --no-load-optim")


def _sources(args: argparse.Namespace) -> "list[StoredCheckpoint]":
    from megatron.core.dist_checkpointing import folders
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint

    if args.last is None and args.steps is None:
        return [StoredCheckpoint.open(folder) for folder in args.load]
    if len(args.load) > 1 or (args.last and args.steps):
        raise ConfigError("--last and --steps are of one folder: give one --load, and one of them")
    folder = args.load[0]
    if args.steps:
        return [StoredCheckpoint.open(folder, step) for step in numbers(args.steps)]
    there = folders.complete_iterations(folder)
    if len(there) < args.last:
        raise CheckpointError(
            f"{folder} has {len(there)} checkpoints ({', '.join(map(str, there)) or 'none'}), "
            f"fewer than --last {args.last}"
        )
    return [StoredCheckpoint.open(folder, step) for step in there[-args.last :]]


def _weights(args: argparse.Namespace, number: int) -> list[float]:
    from tools.checkpoint import mean

    if args.weights and args.ema is not None:
        raise ConfigError("--weights and --ema exclude each other; give one of them")
    if args.ema is not None:
        return mean.exponential(args.ema, number)
    if args.weights is None:
        return mean.shares([1.0] * number)
    try:
        found = [float(word) for word in args.weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {args.weights} are no numbers; write 0.5,0.3,0.2") from None
    if len(found) != number:
        raise ConfigError(f"--weights {args.weights}: {len(found)} for {number} checkpoints")
    return mean.shares(found)


def _refuse_optim(sources: "Sequence[StoredCheckpoint]") -> None:
    from tools.checkpoint.keys import parts_of

    kinds = [{k for key in c.keys if (k := parts_of(key)).is_optimizer} for c in sources]
    for source, found in zip(sources, kinds, strict=True):
        if not found or found != kinds[0]:
            what = "no state of an optimizer" if not found else "another optimizer's state"
            raise CheckpointError(f"--keep-optim: {source.path} has {what}; leave it out")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Write the weighted mean of checkpoints of one model.")
    add = parser.add_argument
    add("--load", type=Path, action="append", required=True, metavar="FOLDER",
        help="Folder of checkpoints (the latest counts), or one of them. Repeatable.")  # fmt: skip
    add("--last", type=command_line.positive, metavar="N", help="The last N of the folder.")
    add("--steps", metavar="LIST", help="These iterations of the folder, such as 100,200.")
    add("--save", type=Path, required=True, metavar="FOLDER", help="Folder for the mean.")
    add("--weights", metavar="LIST",
        help="A weight for each, such as 1,2,3; --last begins with the oldest.")  # fmt: skip
    add("--ema", type=float, metavar="D",
        help="Exponential mean: each later one makes it D x mean + (1 - D) x it.")  # fmt: skip
    add("--keep-optim", action="store_true",
        help="Average the state of the optimizer too; it is left out when not set.")  # fmt: skip
    return parser.parse_tool_args(argv)


if __name__ == "__main__":
    command_line.run_tool(main)
