"""Make a Mixture of Experts of a dense model, with a receipt that its function was kept.

Sources: sparse upcycling (arXiv:2212.05055), fine-grained (arXiv:2410.07524), drop-upcycling
(arXiv:2502.19261).
"""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else it hides Python's own inspect

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron.core.errors import ConfigError
from megatron.training.config.flags import read_command_line
from megatron.training.config.options import options_of
from megatron.training.config.ranges import range_problems
from megatron.training.config.run_config import RunConfig
from megatron.training.upcycling.preservation import Recipe, folds, tokens_crowd
from megatron.training.upcycling.widths import MOE_OPTIONS, upcycled_config
from tools.checkpoint.byte_counts import size_text
from tools.preprocessing import command_line

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint

ROW_LENGTH = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code: 1 where the function should be kept and is not."""
    words = sys.argv[1:] if argv is None else list(argv)
    args, values = _parse(words)
    from megatron.training.upcycling.dense_source import dense_source

    with dense_source(args.load, args.ckpt_step, scratch=args.save.parent) as source:
        if args.only_receipt:
            return _receipt(args, source)
        _write(args, values, source, " ".join(words))
        return 0 if args.no_receipt else _receipt(args, source)


def _write(
    args: argparse.Namespace, values: dict[str, Any], source: "StoredCheckpoint", words: str
) -> None:
    from megatron.training.resume_rules import config_from_data
    from megatron.training.upcycling.expert_tensors import channel_text
    from megatron.training.upcycling.widths import channels_of
    from megatron.training.upcycling.writing import write_upcycled

    recipe = Recipe(
        granularity=args.granularity,
        noise=args.noise,
        drop=args.drop,
        seed=args.seed,
        router_std=args.router_std,
    )
    dense = config_from_data(source.common["config"])
    new = upcycled_config(dense, values, recipe.granularity, fold=args.fold)
    model = new.model
    path, size = write_upcycled(
        source, args.save, new, recipe, history=f"upcycle {words}", origin=args.load
    )
    pairs = zip(model.moe_experts_by_layer, model.moe_topk_by_layer, strict=True)
    kinds: dict[tuple[int, int], list[str]] = {}
    for layer, kind in zip(model.moe_layers, pairs, strict=True):
        kinds.setdefault(kind, []).append(str(layer))
    for (experts, topk), layers in kinds.items():
        name = f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"
        print(f"{name}: {experts} experts, top-{topk}")
    print(f"experts   {channel_text(channels_of(model, recipe.granularity))}")
    of_router = model.moe_router_topk_scaling_factor
    print(f"scale     --moe-router-topk-scaling-factor {1 if of_router is None else of_router:g}")
    if folded := sorted(set(folds(model, recipe.granularity).values()) - {1.0}):
        print(f"          second matrices are multiplied by {', '.join(f'{f:g}' for f in folded)}")
    print(f"wrote {path} ({size_text(size)})")
    if any(tokens_crowd(model.for_layer(layer)) for layer in model.moe_layers):
        print(
            "note: scores choose experts here, and all are equal, so all tokens begin at the first "
            "experts; --router-std 1e-4 spreads them, and changes weights by about as much"
        )
    print(f"to train on: --load {args.save} --use-checkpoint-args")


def _receipt(args: argparse.Namespace, source: "StoredCheckpoint") -> int:
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint
    from megatron.core.dist_checkpointing.store import OpenCheckpoint
    from megatron.training.checkpoint_model import saved_tokenizer
    from megatron.training.upcycling.writing import ITERATION, UPCYCLING
    from tools.checkpoint import upcycle_receipt, upcycle_text

    mixture = StoredCheckpoint.open(args.save, ITERATION)
    if UPCYCLING not in mixture.common:
        raise ConfigError(f"{mixture.path} was not made by upcycling")
    recipe = {name: value for name, value in mixture.common[UPCYCLING].items() if name != "dense"}
    options = mixture.common["config"]
    longest = options["model"]["max_position_embeddings"] or ROW_LENGTH
    rows = upcycle_text.rows_of(
        args.receipt_data,
        saved_tokenizer(OpenCheckpoint(source.path, dict(source.common))),
        upcycle_receipt.known_ids(source),
        length=min(ROW_LENGTH, longest, options["data"]["seq_length"] or longest),
        num_tokens=args.receipt_tokens,
    )
    receipt = upcycle_receipt.measured(source, mixture, rows, Recipe(**recipe))
    print(receipt.table())
    print(f"receipt   {receipt.write(args.save)}")
    return int(receipt.is_wrong)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the tool's own options, and the values of the options of MoE layers."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    options = {
        name: option for name, option in options_of(RunConfig).items() if name in MOE_OPTIONS
    }
    given = read_command_line(rest, options)
    problems = [*given.problems, *(text for _, text in range_problems(given.values, options))]
    problems += [f"{flag} is no option of this tool" for flag in given.actions]
    if not 0 <= args.drop <= 1:
        problems.append(f"--drop {args.drop} must lie between 0 and 1")
    if not 0 <= args.noise < float("inf"):
        problems.append(f"--noise {args.noise} must be 0 or more")
    if args.router_std is not None and not 0 < args.router_std < float("inf"):
        problems.append(f"--router-std {args.router_std} must be above 0")
    if args.only_receipt and (given.values or args.no_receipt):
        problems.append("--only-receipt makes nothing: leave out the options of experts")
    if not args.only_receipt and not given.values.keys() & {
        "num_moe_experts",
        "moe_num_experts_per_layer",
    }:
        problems.append("--num-experts is missing")
    ConfigError.raise_if_any(problems)
    return args, given.values


def _parser() -> command_line.ToolParser:
    parser = command_line.ToolParser(
        "Make a Mixture of Experts of a dense model, and show that its function was kept. Every "
        "option of MoE layers of pretrain_gpt.py may be given too: --num-experts E, "
        "--moe-router-topk K, --moe-router-pre-softmax, --moe-layer-freq, ... E and K are those of "
        "the result."
    )
    add, number = parser.add_argument, command_line.positive
    add("--load", type=Path, required=True, metavar="FOLDER",
        help="Folder of dense checkpoints, one of them, or one of Hugging Face's.")  # fmt: skip
    add("--ckpt-step", type=number, metavar="N",
        help="Iteration to load; the latest when not set.")  # fmt: skip
    add("--save", type=Path, required=True, metavar="FOLDER",
        help="Folder for the new checkpoint, of iteration 0.")  # fmt: skip
    add("--granularity", "--moe-upcycling-granularity", type=number, default=1, metavar="G",
        help="Cut each copy into G experts of 1/G of its ffn channels.")  # fmt: skip
    add("--noise", type=float, default=0.0, metavar="S",
        help="Multiply weights of all copies but the first by 1 + S x N(0, 1).")  # fmt: skip
    add("--drop", type=float, default=0.0, metavar="R",
        help="Draw this share of the ffn channels of each expert anew.")  # fmt: skip
    add("--seed", type=int, default=1234, metavar="N", help="Of all that is drawn.")
    add("--router-std", type=float, metavar="X",
        help="Standard deviation of router rows; the model's, or small enough to keep the "
        "function, when not set.")  # fmt: skip
    add("--fold", action="store_true",
        help="Multiply second matrices instead of setting --moe-router-topk-scaling-factor, for "
        "formats that have no such factor.")  # fmt: skip
    add("--receipt-data", type=Path, metavar="PATH",
        help="Text, .jsonl, or prefix of preprocessed data; the source of Python's standard "
        "library when not set.")  # fmt: skip
    add("--receipt-tokens", type=number, default=2048, metavar="N", help="Tokens to compare.")
    add("--no-receipt", action="store_true", help="Compare nothing.")
    add("--only-receipt", action="store_true",
        help="Compare --load with what was upcycled into --save before.")  # fmt: skip
    return parser


def _run() -> None:
    if code := main():
        sys.exit(code)


if __name__ == "__main__":
    command_line.run_tool(_run)
