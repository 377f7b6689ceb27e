"""Exchange checkpoints with Hugging Face: a folder of theirs to one of ours, or back.

One process, no GPU, one tensor in memory at a time. Weights are copied, never computed; what a
folder has and a model wants is compared name by name.
"""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else it hides Python's own inspect

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.core.errors import ConfigError
from megatron.core.models.huggingface.family import FAMILIES
from tools.checkpoint.byte_counts import size_text
from tools.preprocessing import command_line

if TYPE_CHECKING:
    from megatron.training.huggingface import Exchanged

FORMATS = ("fp32", "bf16", "fp16", "fp64")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    from megatron.training.huggingface import export_checkpoint, import_checkpoint

    if args.to == "megatron":
        done = import_checkpoint(
            args.load,
            args.save,
            dtype=args.dtype,
            make_vocab_size_divisible_by=args.make_vocab_size_divisible_by or 1,
            ignore_fields=args.ignore_config_fields,
            with_mtp=args.with_mtp,
        )
    else:
        done = export_checkpoint(
            args.load,
            args.save,
            iteration=args.ckpt_step,
            family=args.family,
            dtype=args.dtype,
            vocab_size=args.vocab_size,
            reference=args.reference,
            max_shard_bytes=args.max_shard_size,
        )
    _report(done, args.to)


def _report(done: "Exchanged", target: str) -> None:
    from megatron.training.huggingface_flags import flags_of

    lines = {
        "family": f"{done.family.name} ({done.family.title})",
        "wrote": str(done.path),
        "tensors": f"{done.num_tensors:,} ({size_text(done.size_bytes)})",
        "time": f"{done.seconds:.1f} s",
    }
    if target == "hf":
        lines["verified"] = "read back, every tensor bit-equal"
    if done.ignored:
        more = f" and {len(done.ignored) - 5} more" if len(done.ignored) > 5 else ""
        lines["left out"] = ", ".join(done.ignored[:5]) + more
    lines["options"] = flags_of(done.options)
    for name, text in lines.items():
        print(f"{name:9} {text}")


def size(text: str) -> int:
    """Read a number of bytes such as 5GB, 200MiB or 1000."""
    digits = text.rstrip("kKmMgGiIbB")
    unit = text[len(digits) :].upper()
    if unit and unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 5GB or 500MiB")
    try:
        found = int(float(digits) * _UNITS.get(unit, 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 5GB or 500MiB") from None
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least one byte")
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Exchange checkpoints with Hugging Face.")
    add, number = parser.add_argument, command_line.positive
    add("--from", dest="source", choices=("hf", "megatron"), required=True, help="What --load is.")
    add("--to", choices=("hf", "megatron"), required=True, help="What --save becomes.")
    add("--load", type=Path, required=True, metavar="FOLDER",
        help="A folder with config.json and safetensors, or of checkpoints.")  # fmt: skip
    add("--save", type=Path, required=True, metavar="FOLDER", help="Folder for the result.")
    add("--dtype", choices=FORMATS, help="Number format of the result; as it is when not set.")
    add("--make-vocab-size-divisible-by", type=number, metavar="N",
        help="To megatron: add rows of zeros to the vocabulary up to a multiple of N, say "
        "128 x --tensor-model-parallel-size; none when not set.")  # fmt: skip
    add("--ignore-config-fields", nargs="+", default=[], metavar="NAME",
        help="To megatron: unknown fields of config.json that change nothing.")  # fmt: skip
    add("--with-mtp", action="store_true",
        help="To megatron: take the modules of multi-token prediction too.")  # fmt: skip
    add("--ckpt-step", type=number, metavar="N",
        help="From megatron: iteration to read; the latest when not set.")  # fmt: skip
    add("--family", choices=tuple(FAMILIES), help="To hf: how to name the weights; as it was "
        "imported, else the first that fits, when not set.")  # fmt: skip
    add("--vocab-size", type=number, metavar="N",
        help="To hf: rows of the vocabulary to write; as imported, else the ids of the "
        "tokenizer, when not set.")  # fmt: skip
    add("--reference", type=Path, metavar="FOLDER",
        help="To hf: take tokenizer and generation settings from this folder of theirs; from "
        "the checkpoint when not set.")  # fmt: skip
    add("--max-shard-size", type=size, default=5 * 10**9, metavar="SIZE",
        help="To hf: largest file of tensors, such as 5GB or 500MiB.")  # fmt: skip
    args = parser.parse_tool_args(argv)
    _refuse(args)
    return args


def _refuse(args: argparse.Namespace) -> None:
    problems = []
    if args.source == args.to:
        problems.append(f"--from {args.source} --to {args.to}: nothing to convert")
    to_hf = ("ckpt_step", "family", "vocab_size", "reference")
    to_ours = ("make_vocab_size_divisible_by", "ignore_config_fields", "with_mtp")
    for name in to_hf if args.to == "megatron" else to_ours:
        if getattr(args, name):
            problems.append(f"--{name.replace('_', '-')} has no effect with --to {args.to}")
    ConfigError.raise_if_any(problems)


if __name__ == "__main__":
    command_line.run_tool(main)
