"""Look into checkpoints: what one holds, whether it is whole, in what two differ."""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else it hides Python's own inspect

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core.errors import ConfigError
from tools.checkpoint.byte_counts import size_text
from tools.preprocessing import command_line

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint
    from tools.checkpoint.contents import Contents
    from tools.checkpoint.difference import Difference

_SHOWN = 10
_ALL = "*"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 1 where something is damaged or different, else 0."""
    args = _parse(argv)
    if args.diff:
        return _diff(args)
    if args.verify:
        return _verify(args)
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint

    checkpoint = StoredCheckpoint.open(args.folder, args.ckpt_step)
    if args.tensors:
        _show_tensors(checkpoint, args)
        return 0
    _show(checkpoint, args)
    return 0


def _show(checkpoint: "StoredCheckpoint", args: argparse.Namespace) -> None:
    from tools.checkpoint.contents import contents_of

    contents = contents_of(checkpoint)
    common = checkpoint.common
    if args.json:
        told = {name: value for name, value in common.items() if name != "config"}
        _print_json({"path": str(checkpoint.path), **told, **contents.data()})
        return
    total = sum(contents.bytes_of.values())
    optimizer = common["optimizer"]
    tokenizer = common["tokenizer"]
    lines = {
        "checkpoint": f"{checkpoint.path}",
        "size": f"{size_text(total)} in {contents.tensors:,} tensors, "
        f"{_count(contents.files, 'file')}",
        "iteration": f"{common['iteration']:,}, {common['consumed_train_samples']:,} samples",
        "optimizer": f"{optimizer['kind']}, {optimizer['step_count']:,} steps"
        if optimizer
        else "none (weights only)",
        "saved by": f"{_count(common['world_size'], 'rank')}, torch {common['torch']}",
        "tokenizer": f"{tokenizer['type']} of {tokenizer['vocab_size']:,} ids"
        if tokenizer
        else "none",
        "parameters": f"{contents.parameters:,}, of which a token uses "
        f"{contents.active_parameters:,}",
    }
    for name, text in lines.items():
        print(f"{name:<12}{text}")
    for line in common.get("history", []):
        print(f"{'changed by':<12}{line}")
    print("\nmodel\n" + _wrapped(_flags(common["architecture"])))
    print("\n" + _table(contents))


def _table(contents: "Contents") -> str:
    from tools.checkpoint.contents import KINDS

    kinds = [kind for kind in KINDS if contents.bytes_of[kind] and kind != "rng"]
    kinds += sorted(set(contents.bytes_of) - set(KINDS))
    rows = [["", "", "experts", "top-k", "parameters", *(KINDS.get(k, k) for k in kinds), "dtype"]]
    for part in contents.parts:
        experts = [str(part.experts), str(part.topk)] if part.experts else ["", ""]
        sizes = [size_text(part.bytes_of[kind]) for kind in kinds]
        dtypes = " ".join(sorted(part.dtypes))
        rows.append([part.name, part.kind, *experts, f"{part.parameters:,}", *sizes, dtypes])
    sizes = [size_text(contents.bytes_of[kind]) for kind in kinds]
    rows.append(["all", "", "", "", f"{contents.parameters:,}", *sizes, ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, 1, len(row) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    rng = contents.bytes_of["rng"]
    return text + (f"\n{'random states':<16}{size_text(rng)}" if rng else "")


def _show_tensors(checkpoint: "StoredCheckpoint", args: argparse.Namespace) -> None:
    from tools.checkpoint.contents import matching

    keys = matching(checkpoint, args.tensors)
    if not keys:
        raise ConfigError(f"{checkpoint.path} has no tensor that matches {args.tensors}")
    if args.json:
        facts = {key: checkpoint.facts(key) for key in keys}
        _print_json(
            {
                key: {
                    "shape": list(fact.shape),
                    "dtype": str(fact.dtype).removeprefix("torch."),
                    "blocks": len(checkpoint.index[key].blocks),
                }
                for key, fact in facts.items()
            }
        )
        return
    for key in keys:
        number = len(checkpoint.index[key].blocks)
        cut = f" in {number} blocks" if number > 1 else ""
        print(f"{key}  {checkpoint.facts(key)}{cut}")


def _verify(args: argparse.Namespace) -> int:
    from megatron.core.dist_checkpointing.offline import verify_checkpoint

    path, problems = verify_checkpoint(args.folder, args.ckpt_step)
    if args.json:
        _print_json({"path": str(path), "whole": not problems, "problems": problems})
    elif problems:
        print(f"{path} is damaged:")
        print("\n".join(f"  - {problem}" for problem in problems))
    else:
        print(f"{path} is whole: every block of every tensor is as it was written")
    return int(bool(problems))


def _diff(args: argparse.Namespace) -> int:
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint
    from tools.checkpoint.contents import matching
    from tools.checkpoint.difference import difference

    first, second = (StoredCheckpoint.open(folder) for folder in args.diff)
    keys = [matching(checkpoint, args.tensors) for checkpoint in (first, second)]
    if not any(keys):
        raise ConfigError(f"no tensor matches {args.tensors}")
    found = difference(first, second, keys)
    if args.json:
        _print_json({"first": str(first.path), "second": str(second.path), **found.data()})
    else:
        _show_difference(found, first, second)
    return int(not found.is_equal)


def _show_difference(
    found: "Difference", first: "StoredCheckpoint", second: "StoredCheckpoint"
) -> None:
    print(f"first   {first.path}\nsecond  {second.path}")
    lists = {
        "only in the first": found.only_first,
        "only in the second": found.only_second,
        "of another shape or dtype": found.facts,
        "state": found.state,
        "options that differ, which make no other checkpoint": found.options,
    }
    for title, lines in lists.items():
        if lines:
            shown = lines if title == "state" else lines[:_SHOWN]
            print(f"\n{title}" + (f" ({len(lines)} tensors)" if "the " in title else ""))
            print("\n".join(f"  {line}" for line in shown))
            if lines[len(shown) :]:
                print(f"  ... and {len(lines) - len(shown)} more")
    hashed = f" ({found.equal_by_hash} by their hashes alone)" if found.equal_by_hash else ""
    print(f"\nequal      {_count(found.equal, 'tensor')}{hashed}")
    print(f"different  {_count(len(found.different), 'tensor')}")
    if found.first and found.largest and found.largest_relative:
        print(f"  first               {found.first}")
        print(f"  largest             {found.largest}: {found.largest.size:.3g} apart")
        print(
            f"  largest, relative   {found.largest_relative}: {found.largest_relative.size:.3g} "
            "of the larger"
        )
    print("\nthe checkpoints are " + ("equal" if found.is_equal else "DIFFERENT"))


def _flags(architecture: dict[str, Any]) -> Iterable[str]:
    for flag, value in architecture.items():
        if value is None or value is False:
            continue
        yield flag if value is True else f"{flag} {value}"


def _wrapped(words: Iterable[str]) -> str:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 100:
            lines.append("")
        lines[-1] += f"  {word}"
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=1))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Show what a checkpoint holds, check it, or compare two.")
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="FOLDER",
        help="Folder of checkpoints (--save of the run), or one (iter_0000010).")  # fmt: skip
    add("--ckpt-step", type=int, metavar="N", help="Iteration; the latest when not set.")
    add("--tensors", nargs="?", const=_ALL, metavar="PATTERN",
        help="List tensors, all or those that match: with * and ?, or a part of the name; several "
        "with commas. With --diff: compare only these.")  # fmt: skip
    add("--verify", action="store_true",
        help="Compare every byte with its hash; exit code 1 if anything is damaged.")  # fmt: skip
    add("--diff", nargs=2, type=Path, metavar=("A", "B"),
        help="Compare two, whatever layouts saved them; exit code 1 if they differ.")  # fmt: skip
    add("--json", action="store_true", help="Print JSON.")
    args = parser.parse_tool_args(argv)
    if args.diff and (args.folder or args.verify or args.ckpt_step is not None):
        parser.error("--diff takes two folders and stands without FOLDER, --verify and --ckpt-step;"
                     " name one checkpoint of a folder as FOLDER/iter_0000010")  # fmt: skip
    if not args.diff and args.folder is None:
        parser.error("give FOLDER, or --diff A B")
    if args.verify and args.tensors:
        parser.error("--verify looks at all tensors; leave out --tensors")
    return args


if __name__ == "__main__":
    command_line.run_tool(lambda: sys.exit(main()))
