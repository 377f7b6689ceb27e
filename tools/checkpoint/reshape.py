"""Write a checkpoint anew: in other files, cut as the ranks of a layout read it, or weights only.

One process, no GPU, one tensor in memory at a time. Any layout loads any checkpoint; files cut for
a layout are read by their rank alone, from end to end.
"""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else it hides Python's own inspect

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core.errors import ConfigError
from tools.checkpoint.byte_counts import size_text
from tools.preprocessing import command_line

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.index import TensorFacts
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint
    from megatron.core.dist_checkpointing.save_plan import PlannedBlock
    from megatron.training.config.run_config import RunConfig
    from tools.checkpoint.rewrite import Made

SIZES = {
    "target_tensor_parallel_size": "tensor_model_parallel_size",
    "target_pipeline_parallel_size": "pipeline_model_parallel_size",
    "target_expert_parallel_size": "expert_model_parallel_size",
    "target_expert_tensor_parallel_size": "expert_tensor_parallel_size",
    "target_num_virtual_stages": "num_virtual_stages_per_pipeline_rank",
}
"""Flag of the tool -> field of the model's configuration."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint
    from megatron.training.resume_rules import architecture, config_data, config_from_data
    from tools.checkpoint import number_format, rewrite

    source = StoredCheckpoint.open(args.load, args.ckpt_step)
    rewrite.refuse_target(source, args.save, source.common["iteration"])
    config = config_from_data(source.common["config"])
    has_optim = source.common["optimizer"] is not None
    words = " ".join(sys.argv[1:] if argv is None else argv)
    common = dict(source.common)
    if args.no_optim:
        common["optimizer"] = None
    flags = ["--no-load-optim"] if args.no_optim and has_optim else []
    if args.dtype is not None:
        optim = has_optim and not args.no_optim
        number_format.refuse_format(config, args.dtype, optim=optim)
        config = number_format.config_in(config, args.dtype)
        common |= {"architecture": architecture(config.model), "config": config_data(config)}
        common = rewrite.with_history(common, f"reshape {words}")
        flags = [*(["--bf16"] if args.dtype == "bf16" else []), *flags]
    tensors = _tensors(source, config, common, args)
    facts = {key: made.facts for key, made in tensors.items()}
    files = _files(facts, config, common, args)
    path, size = rewrite.write(source, args.save, tensors, common=common, files=files)
    count = sum(map(bool, files))
    largest = max((f.nbytes for f in facts.values()), default=0)
    print(f"wrote {path}: {len(tensors):,} tensors ({size_text(size)}) in {count} files")
    print(f"largest tensor {size_text(largest)}")
    if flags:
        print(f"to train on: --load {args.save} {' '.join(flags)}")


def _tensors(
    source: "StoredCheckpoint",
    config: "RunConfig",
    common: Mapping[str, Any],
    args: argparse.Namespace,
) -> "dict[str, Made]":
    from tools.checkpoint import number_format, rank_tensors
    from tools.checkpoint.keys import parts_of
    from tools.checkpoint.rewrite import copied

    if args.dtype is None:
        keys = [k for k in source.keys if not (args.no_optim and parts_of(k).is_optimizer)]
        return {key: copied(source, key) for key in keys}
    alone = rank_tensors.config_at(config, {}, 1)
    vocab = common["padded_vocab_size"]
    model = next(rank_tensors.tensors_of_ranks(alone, vocab, alone.model.layout(1)))
    return number_format.converted(source, model, optim=common["optimizer"] is not None)


def _files(
    facts: "Mapping[str, TensorFacts]",
    config: "RunConfig",
    common: Mapping[str, Any],
    args: argparse.Namespace,
) -> "list[list[PlannedBlock]]":
    from megatron.core.dist_checkpointing.offline import shared_out
    from megatron.core.dist_checkpointing.save_plan import plan_for_ranks
    from tools.checkpoint import rank_tensors

    sizes = {field: size for flag, field in SIZES.items() if (size := getattr(args, flag))}
    if not sizes and args.target_world_size is None:
        return shared_out(facts, args.files or 1)
    world = args.target_world_size or _smallest_world(sizes)
    vocab = common["padded_vocab_size"]
    if vocab is None:
        raise ConfigError("the checkpoint holds no GPTModel (it has no word embedding)")
    tp = sizes.get("tensor_model_parallel_size", 1)
    if vocab % tp:
        raise ConfigError(f"--target-tensor-parallel-size {tp} must divide the vocabulary {vocab}")
    target = rank_tensors.config_at(config, sizes, world)
    ranks = [
        rank_tensors.with_states(tensors, facts)
        for tensors in rank_tensors.tensors_of_ranks(target, vocab, target.model.layout(world))
    ]
    rank_tensors.refuse_strangers(facts, ranks)
    return plan_for_ranks(ranks)


def _smallest_world(sizes: Mapping[str, int]) -> int:
    from math import lcm

    tp = sizes.get("tensor_model_parallel_size", 1)
    etp = sizes.get("expert_tensor_parallel_size", tp)
    experts = etp * sizes.get("expert_model_parallel_size", 1)
    return lcm(tp, experts) * sizes.get("pipeline_model_parallel_size", 1)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Write a checkpoint anew, for other ranks or in other files.")
    add, number = parser.add_argument, command_line.positive
    add("--load", type=Path, required=True, metavar="FOLDER",
        help="Folder of checkpoints (--save of the run), or one of them.")  # fmt: skip
    add("--ckpt-step", type=int, metavar="N", help="Iteration to read; the latest when not set.")
    add("--save", type=Path, required=True, metavar="FOLDER", help="Folder for the new one.")
    add("--files", type=number, metavar="N", help="Whole tensors, in N files of about equal size.")
    for flag in SIZES:
        add(f"--{flag.replace('_', '-')}", type=number, metavar="N",
            help="Cut as the ranks of this layout read it, a file for each.")  # fmt: skip
    add("--target-world-size", type=number, metavar="N",
        help="Ranks of that layout; the fewest when not set.")  # fmt: skip
    add("--no-optim", action="store_true", help="Leave out the state of the optimizer.")
    add("--dtype", choices=("bf16", "fp32"),
        help="Number format of the model; main weights keep what rounding would lose.")  # fmt: skip
    args = parser.parse_tool_args(argv)
    layout = [flag for flag in (*SIZES, "target_world_size") if getattr(args, flag)]
    if args.files and layout:
        flag = layout[0].replace("_", "-")
        parser.error(f"--files and --{flag} exclude each other: a layout has a file for each rank")
    if not (args.files or layout or args.no_optim or args.dtype):
        parser.error("say what to change: --files, --target-..., --no-optim or --dtype")
    return args


if __name__ == "__main__":
    command_line.run_tool(main)
