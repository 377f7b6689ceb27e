"""Prune, clone, merge or reorder the experts of a checkpoint, moments and router rows too."""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # else it hides Python's own inspect

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron.core.errors import ConfigError
from tools.checkpoint import expert_plans
from tools.checkpoint.byte_counts import size_text
from tools.checkpoint.expert_plans import LayerPlan
from tools.preprocessing import command_line

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint
    from megatron.training.config.run_config import RunConfig

_SHOWN = 16
VERBS = {
    "prune": "Remove experts.",
    "clone": "Put copies of each expert beside it; the model computes what it did.",
    "merge": "Make one expert of several, the weighted mean of their weights.",
    "reorder": "Give experts other numbers; the model computes what it did.",
}


class Surgery(NamedTuple):
    """What is done to a checkpoint."""

    plans: Mapping[int, LayerPlan]
    """MoE layer -> its new experts."""
    topk: Mapping[int, int]
    """MoE layer -> experts a token, where it changes."""
    scaling_factor: float | None = None
    """--moe-router-topk-scaling-factor, where it changes."""
    judges: int | None = None
    """--moe-router-group-score-topk, where it changes."""
    notes: tuple[str, ...] = ()
    """What the user should know."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in VERBS:
        _answer(words)
    verb = words[0]
    args = _parser(verb).parse_tool_args(words[1:])
    _run(verb, args, " ".join(words))


def _run(verb: str, args: argparse.Namespace, words: str) -> None:
    from megatron.core.dist_checkpointing.offline import StoredCheckpoint
    from megatron.training.resume_rules import (
        architecture,
        config_data,
        config_from_data,
        stored_architecture,
    )
    from tools.checkpoint import expert_rules, rewrite
    from tools.checkpoint.expert_edit import edited_tensors

    source = StoredCheckpoint.open(args.load, args.ckpt_step)
    rewrite.refuse_target(source, args.save, source.common["iteration"])
    config = config_from_data(source.common["config"])
    experts = expert_rules.experts_of(config.model)
    expert_rules.refuse_hash(config.model)
    surgery = _WORK[verb](args, config, experts, source)
    ConfigError.raise_if_any(expert_rules.group_problems(config.model, surgery.plans))
    new = expert_rules.edited_config(
        config, surgery.plans, surgery.topk, surgery.scaling_factor, surgery.judges
    )
    has_optim = source.common["optimizer"] is not None
    common = rewrite.with_history(source.common, f"experts {words}") | {
        "architecture": architecture(new.model),
        "config": config_data(new),
    }
    if args.no_optim:
        common["optimizer"] = None
    tensors = edited_tensors(
        source, surgery.plans, with_optim=not args.no_optim, noise=getattr(args, "noise", 0.0)
    )
    path, size = rewrite.write(source, args.save, tensors, common=common)
    for layer, plan in surgery.plans.items():
        print(f"layer {layer}: {experts[layer]} experts -> {len(plan)}: {_plan_text(plan)}")
    print(f"wrote {path} ({size_text(size)})")
    for note in surgery.notes:
        print(f"note: {note}")
    flags = expert_rules.changed_flags(stored_architecture(dict(source.common)), new)
    if args.no_optim and has_optim:
        flags.append("--no-load-optim")
    if flags:
        print(f"to train on: --load {args.save} {' '.join(flags)}")


def _prune(
    args: argparse.Namespace,
    config: "RunConfig",
    experts: Mapping[int, int],
    source: "StoredCheckpoint",
) -> Surgery:
    from tools.checkpoint import expert_rules, expert_trace

    ways = {"--keep": args.keep, "--drop": args.drop, "--unused-in": args.unused_in}
    given = [flag for flag, value in (ways | {"--keep-top": args.keep_top}).items() if value]
    if len(given) != 1:
        raise ConfigError(
            f"prune takes one of --keep, --drop, --unused-in and --keep-top, not "
            f"{' and '.join(given) or 'none'}"
        )
    layers = _layers(args, experts)
    if (args.keep_top is None) != (args.tokens_in is None):
        raise ConfigError("--keep-top N and --tokens-in TRACE need each other")
    keep = {}
    if args.keep or args.drop:
        lists = expert_plans.per_layer(args.keep or args.drop, layers, given[0])
        for layer, text in lists.items():
            named = expert_plans.experts_in(text, layer, layers[layer], given[0])
            rest = [e for e in range(layers[layer]) if e not in named]
            keep[layer] = sorted(named) if args.keep else rest
    else:
        counts = expert_trace.tokens_of(args.unused_in or args.tokens_in, args, layers)
        for layer, tokens in counts.items():
            least = max(args.topk or dict(_topk(config))[layer], 1)
            number = args.keep_top or max(sum(map(bool, tokens)), least)
            number = -(-number // args.multiple_of) * args.multiple_of
            keep[layer] = expert_plans.by_load(tokens, min(number, len(tokens)))
    plans = {layer: expert_plans.kept(found) for layer, found in keep.items()}
    if empty := [layer for layer, plan in plans.items() if not plan]:
        raise ConfigError(f"layer {empty[0]} would have no expert left")
    notes = [
        f"tokens that never chose what goes are computed otherwise too: {reason}"
        for reason in expert_rules.unlike(config.model)
    ]
    topk, more = _new_topk(args, config, plans)
    return Surgery(plans, topk, notes=(*notes, *more))


def _clone(
    args: argparse.Namespace,
    config: "RunConfig",
    experts: Mapping[int, int],
    source: "StoredCheckpoint",
) -> Surgery:
    from tools.checkpoint import expert_rules

    layers, copies, keep_topk = _layers(args, experts), args.copies, args.keep_topk
    before = {layer: topk for layer, topk in _topk(config) if layer in layers}
    ConfigError.raise_if_any(expert_rules.clone_problems(config.model, before, keep_topk=keep_topk))
    share = 1.0 if keep_topk else 1.0 / copies
    plans = {layer: expert_plans.cloned(number, copies, share) for layer, number in layers.items()}
    topk = {} if keep_topk else {layer: k * copies for layer, k in before.items()}
    other, notes = _new_topk(args, config, plans, copies=1 if keep_topk else copies)
    if config.model.moe_z_loss_coeff and not keep_topk:
        notes.append(f"--moe-z-loss-coeff sees logits that are larger by log {copies} together")
    if args.noise:
        notes.append(f"--noise {args.noise}: the model computes almost what it did, not quite")
    elif not keep_topk:
        notes.append("copies get equal gradients and stay alike; --noise makes them differ")
    scaling = expert_rules.scaling_of_clones(config.model, copies, keep_topk=keep_topk)
    judges = expert_rules.judges_of_clones(config.model, copies)
    return Surgery(plans, topk | other, scaling, judges, tuple(notes))


def _merge(
    args: argparse.Namespace,
    config: "RunConfig",
    experts: Mapping[int, int],
    source: "StoredCheckpoint",
) -> Surgery:
    from tools.checkpoint import expert_trace

    layers = _layers(args, experts)
    lists = expert_plans.per_layer(args.groups, layers, "--groups")
    chosen = {layer: layers[layer] for layer in lists}
    shares = {}
    if args.tokens_in:
        counts = expert_trace.tokens_of(args.tokens_in, args, chosen)
        shares = {layer: dict(enumerate(map(float, found))) for layer, found in counts.items()}
    plans = {}
    for layer, text in lists.items():
        groups = [
            expert_plans.experts_in(part, layer, layers[layer], "--groups")
            for part in text.split(";")
        ]
        members = [expert for group in groups for expert in group]
        if twice := sorted({e for e in members if members.count(e) > 1}):
            raise ConfigError(f"--groups {text} has expert {twice[0]} twice")
        weights = shares.get(layer) or expert_plans.group_weights(args.weights, groups)
        plans[layer] = expert_plans.merged(layers[layer], groups, weights)
    topk, notes = _new_topk(args, config, plans)
    return Surgery(plans, topk, notes=tuple(notes))


def _reorder(
    args: argparse.Namespace,
    config: "RunConfig",
    experts: Mapping[int, int],
    source: "StoredCheckpoint",
) -> Surgery:
    layers = _layers(args, experts)
    plans = {}
    for layer, text in expert_plans.per_layer(args.order, layers, "--order").items():
        order = expert_plans.experts_in(text, layer, layers[layer], "--order")
        if len(order) != layers[layer]:
            missing = sorted(set(range(layers[layer])) - set(order))
            raise ConfigError(
                f"--order {text} leaves out expert {missing[0]} of layer {layer}; give all of them"
            )
        plans[layer] = expert_plans.kept(order)
    return Surgery(plans, {})


_WORK = {"prune": _prune, "clone": _clone, "merge": _merge, "reorder": _reorder}


def _layers(args: argparse.Namespace, experts: Mapping[int, int]) -> dict[int, int]:
    if args.layers is None:
        return dict(experts)
    chosen = expert_plans.numbers(args.layers)
    if wrong := [layer for layer in chosen if layer not in experts]:
        raise ConfigError(
            f"--layers {args.layers}: layer {wrong[0]} has no experts; MoE layers are "
            f"{', '.join(map(str, experts))}"
        )
    return {layer: experts[layer] for layer in chosen}


def _topk(config: "RunConfig") -> list[tuple[int, int]]:
    return list(zip(config.model.moe_layers, config.model.moe_topk_by_layer, strict=True))


def _new_topk(
    args: argparse.Namespace,
    config: "RunConfig",
    plans: Mapping[int, LayerPlan],
    copies: int = 1,
) -> tuple[dict[int, int], list[str]]:
    if args.topk is None:
        return {}, []
    before = [topk * copies for layer, topk in _topk(config) if layer in plans]
    note = f"--topk {args.topk}: tokens have another number of experts, the model is another one"
    return dict.fromkeys(plans, args.topk), [note] if set(before) != {args.topk} else []


def _plan_text(plan: LayerPlan) -> str:
    words = []
    for new in plan[:_SHOWN]:
        if new.is_copy:
            words.append(str(new.parts[0][0]))
        else:
            words.append("+".join(f"{weight:.3g}x{old}" for old, weight in new.parts))
    return ", ".join(words) + (", ..." if plan[_SHOWN:] else "")


def _answer(words: Sequence[str]) -> None:
    parser = command_line.ToolParser("Change the experts of a checkpoint, moments included.")
    listed = ", ".join(VERBS)
    verbs = " ".join(f"{verb}: {text}" for verb, text in VERBS.items())
    parser.add_argument("what", choices=VERBS, help=f"{verbs} Each has its own --help.")
    if words and words[0] in ("-h", "--help"):
        parser.parse_tool_args(["--help"])
    parser.error(f"say first what to do, {listed}" + (f", not {words[0]}" if words else ""))


def _parser(verb: str) -> command_line.ToolParser:
    parser = command_line.ToolParser(VERBS[verb])
    parser.prog += f" {verb}"
    add, number = parser.add_argument, command_line.positive
    add("--load", type=Path, required=True, metavar="FOLDER",
        help="Folder of checkpoints (--save of the run), or one of them.")  # fmt: skip
    add("--ckpt-step", type=int, metavar="N", help="Iteration to read; the latest when not set.")
    add("--save", type=Path, required=True, metavar="FOLDER",
        help="Folder for the new checkpoint.")  # fmt: skip
    add("--layers", metavar="LIST", help="MoE layers to change, such as 1,3-5; all when not set.")
    add("--no-optim", action="store_true", help="Leave out the state of the optimizer.")
    if verb == "prune":
        add("--keep", action="append", metavar="[LAYER:]LIST",
            help="Experts to keep, such as 0-3,6; of one layer 2:0-3,6. Repeatable.")  # fmt: skip
        add("--drop", action="append", metavar="[LAYER:]LIST", help="Experts to remove.")
        add("--unused-in", type=Path, metavar="TRACE",
            help="Remove experts that no token chose in this routing trace.")  # fmt: skip
        add("--keep-top", type=number, metavar="N",
            help="Keep the N experts of each layer with the most tokens.")  # fmt: skip
        add("--multiple-of", type=number, default=1, metavar="N",
            help="With a trace: keep more, until N divides the number of each layer.")  # fmt: skip
    if verb in ("prune", "merge"):
        add("--tokens-in", type=Path, metavar="TRACE",
            help="Routing trace that says how many tokens each expert had.")  # fmt: skip
        add("--first-step", type=int, default=1, metavar="N", help="First step of the trace.")
        add("--last-step", type=int, metavar="N", help="Last step; the last when not set.")
    if verb == "clone":
        add("--copies", type=number, default=2, metavar="K", help="Experts made of each one.")
        add("--keep-topk", action="store_true",
            help="Leave --moe-router-topk at 1; else it becomes K times as large.")  # fmt: skip
        add("--noise", type=float, default=0.0, metavar="S",
            help="Multiply weights of copies by 1 + S x N(0, 1), so that they differ.")  # fmt: skip
    if verb == "merge":
        add("--groups", action="append", required=True, metavar="[LAYER:]LIST;LIST",
            help='Experts to merge, such as "0,1;2,3". May be repeated.')  # fmt: skip
        add("--weights", metavar="LIST;LIST",
            help='Weights in each group, such as "3,1;1,1"; equal when not set.')  # fmt: skip
    if verb == "reorder":
        add("--order", action="append", required=True, metavar="[LAYER:]LIST",
            help="For each new number the old one, such as 3,1,0,2. May be repeated.")  # fmt: skip
    else:
        add("--topk", type=number, metavar="N", help="Experts a token of the new model.")
    return parser


if __name__ == "__main__":
    command_line.run_tool(main)
