"""Prove that your model trains the same on any layout: every layout against one process.

    python tools/verify_layouts.py                           a small MoE model
    python tools/verify_layouts.py --scale-down YOUR FLAGS   your model, made small
    python tools/verify_layouts.py --layouts quick --only 'cp2*zero1'

Takes all options of pretrain_gpt.py. Ranks are processes of this machine, over gloo, on CPU.
"""

import argparse
import fnmatch
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import ConfigError
from megatron.training.user_errors import exit_on_user_error
from tools.layouts.cases import DEFAULT_WORDS, Base, config_of, read_base
from tools.layouts.matrix import Row, chosen, full_matrix
from tools.layouts.scale_down import scaled_down

COPIES = 12
"""Copies of the weights that a rank holds at most: gradients, moments, and records of two steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the layouts; 1 when one of them is not what one process is."""
    args, words = _parse(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error():
        base = _base(args, words or list(DEFAULT_WORDS))
    from tools.layouts import table
    from tools.layouts.quick import QUICK
    from tools.layouts.verification import Verifier

    verifier = Verifier(
        base.values,
        dtype=args.dtype,
        steps=args.steps,
        max_ranks=args.max_ranks,
        own_layout=base.own_layout,
    )
    with exit_on_user_error():
        if args.layouts == "quick" or args.layout:
            names = [args.layout] if args.layout else QUICK
            rows = chosen(names, verifier.axes, verifier.judge)
        else:
            rows = full_matrix(verifier.axes, verifier.judge)
        rows = _wanted(rows, args.only)
    outcomes = []
    for row in rows:
        outcomes.append(verifier.run(row))
        print(table.line(outcomes[-1]), flush=True)
    print(table.summary(outcomes, verifier.tolerance.error))
    if args.markdown:
        Path(args.markdown).write_text(_page(args, words, outcomes))
    return int(any(outcome.is_wrong for outcome in outcomes))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--max-ranks", type=_at_least_1, default=8, metavar="N", help="largest layout (default: 8)")
    add("--scale-down", action="store_true", help="make the model small, with all its features")
    add("--layouts", choices=["quick", "full"], default="full", help="how many (default: full)")
    add("--dtype", choices=["fp64", "fp32", "bf16"], default="fp64", help="default: fp64, exact")
    add("--layout", metavar="NAMES", help="this layout alone, such as 'tp2 sp zero1'")
    add("--only", metavar="PATTERN", help="layouts whose name holds this, with * and ?")
    add("--markdown", metavar="FILE", help="write the table there")
    add("--steps", type=_at_least_1, default=2, metavar="N", help="optimizer steps (default: 2)")
    return parser.parse_known_args(argv)


def _base(args: argparse.Namespace, words: list[str]) -> Base:
    """Read the user's model, and make it small if asked to."""
    base = read_base(words, args.dtype)
    values = base.values
    if args.scale_down:
        values = scaled_down(values, config_of(values, [], 1, "sgd").model.moe_layer_pattern)
    config = config_of(values, [], 1, "sgd")
    if args.dtype == "bf16" and config.model.num_moe_experts and _routes_by_score(values):
        print(
            "bf16: experts are drawn at random for each token (--moe-router-force-load-balancing), "
            "for rounding would choose others on other layouts; fp64 compares the choice itself"
        )
        values = values | {"moe_router_force_load_balancing": True}
    needed = _parameters(values) * 8 * COPIES * args.max_ranks
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"runs on {args.max_ranks} ranks of this machine need about {needed / 2**30:.0f} GiB, "
            f"it has {there / 2**30:.0f}: add --scale-down, or use fewer --max-ranks"
        )
    return base._replace(values=values)


def _routes_by_score(values: dict[str, Any]) -> bool:
    """Return whether tokens choose their experts by scores, which rounding changes."""
    forced = values.get("moe_router_force_biased") is not None
    return values.get("moe_router_type", "topk") == "topk" and not forced


def _parameters(values: dict[str, Any]) -> int:
    """Count the parameters of the model without making them."""
    import dataclasses

    import torch
    import torch.distributed as dist

    from megatron.core.param_role import deferred_init
    from megatron.core.process_groups_config import ProcessGroupCollection
    from pretrain_gpt import model_provider

    names = [entry.name for entry in dataclasses.fields(ProcessGroupCollection)]
    one = ProcessGroupCollection(**{name: dist.ProcessGroup(0, 1) for name in names})
    with torch.device("meta"), deferred_init():
        model = model_provider(config_of(values, [], 1, "sgd"), one)
    return sum(param.numel() for param in model.parameters())


def _wanted(rows: list[Row], pattern: str | None) -> list[Row]:
    if pattern is None:
        return rows
    found = [row for row in rows if fnmatch.fnmatch(row.name, f"*{pattern}*")]
    ConfigError.raise_if_any([] if found else [f"--only {pattern}: no layout has such a name"])
    return found


def _at_least_1(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _page(args: argparse.Namespace, words: list[str], outcomes: Sequence[Any]) -> str:
    from tools.layouts import table
    from tools.layouts.compare import TOLERANCES

    shown = " ".join(["python tools/verify_layouts.py", *sys.argv[1:]])
    head = table.HEAD.format(
        command="make verify" if not words and args.layouts == "full" else shown,
        model=" ".join(words or DEFAULT_WORDS),
        summary=table.summary(outcomes, TOLERANCES[args.dtype].error),
        steps=args.steps,
        dtype=args.dtype,
    )
    return table.page(outcomes, head)


if __name__ == "__main__":
    sys.exit(main())
