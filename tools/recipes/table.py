"""The page of recipes, docs/recipes.md. Pure."""

from collections.abc import Mapping, Sequence

from tools.recipes.compare import difference, is_equal
from tools.recipes.published import Published
from tools.recipes.runs import Plan, Toy

HEAD = """# Recipes

Written by `make recipes`; do not edit. {summary}

Each row is a script in `examples/`, and a YAML file too. How to start one is in
[examples/README.md](../examples/README.md).

## At full size

`train_X.sh --plan` builds every rank of the cluster without memory, runs a step without numbers
([dry run](dry_run.md)) and counts. *Published* is what the makers say, in billions; *counted* is
ours. They are equal within 1 %, or have the published digits, which `1.3` has of all from 1.25 to
1.40 (rounded, or cut off). The makers of GPT-OSS and DeepSeek leave the embedding out of the active
parameters, and those of DeepSeek-V3 its module for multi-token prediction out of both; so does
*counted* here. *Memory* is that of the rank that
needs most, in GiB, without what allocator, kernels and NCCL take. No rank waits for ever in any of
them.
"""

TOYS = """
## On a laptop

`train_X.sh --toy` trains the same features in a small model on 2 CPU ranks over gloo, on made-up
counting sequences.
"""


def plan_line(example: str, plan: Plan) -> str:
    """Say in a line what the plan of ``example`` found."""
    return (
        f"{example}: {plan.total:,} parameters, {plan.active:,} for a token, {plan.gib:.1f} GiB a "
        f"rank of {plan.world_size:,}; {plan.seconds:.0f} s"
    )


def toy_line(example: str, toy: Toy) -> str:
    """Say in a line how the toy of ``example`` trained."""
    return (
        f"{example} --toy: loss {toy.first_loss:.3f} to {toy.last_loss:.3f} in {toy.steps} steps; "
        f"{toy.seconds:.0f} s"
    )


def counted(published: Published, plan: Plan) -> tuple[int, int]:
    """Return the total and active parameters that compare with what is published."""
    mtp = plan.mtp if published.without_mtp else (0, 0)
    rows = plan.embedding if published.without_embedding else 0
    return plan.total - mtp[0], plan.active - mtp[1] - rows


def problems_of(published: Published, plan: Plan) -> list[str]:
    """Say what is wrong with a plan: a number that differs, ranks that stand still."""
    total, active = counted(published, plan)
    found = []
    if not is_equal(published.total, total):
        found.append(f"{published.example}: {total:,} parameters, published {published.total} B")
    if published.active is not None and not is_equal(published.active, active):
        found.append(f"{published.example}: {active:,} for a token, published {published.active} B")
    if plan.deadlock is not None:
        found.append(f"{published.example}: {plan.deadlock[0]}")
    return found


def page(
    plans: Mapping[str, Plan], toys: Mapping[str, Toy], published: Sequence[Published], summary: str
) -> str:
    """Return the whole page."""
    lines = [
        HEAD.format(summary=summary),
        "| example | total: published | counted | | for a token: published | counted | | GPUs "
        "| layout | memory | where |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|---|",
    ]
    lines += [_plan_row(one, plans[one.example]) for one in published]
    lines += [
        TOYS,
        "| example | steps | first loss | last loss | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    for one in published:
        toy = toys[one.example]
        lines.append(
            f"| {one.example} | {toy.steps} | {toy.first_loss:.3f} | {toy.last_loss:.3f} "
            f"| {toy.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _plan_row(one: Published, plan: Plan) -> str:
    total, active = counted(one, plan)
    cells = [
        f"[{one.example}](../examples/{_script(one.example)})",
        f"{one.total} ({one.source})",
        f"{total / 1e9:.2f}",
        f"{difference(one.total, total):+.1%}",
        one.active or "",
        f"{active / 1e9:.2f}" if one.active else "",
        f"{difference(one.active, active):+.1%}" if one.active else "",
        f"{plan.world_size:,}",
        plan.layout,
        f"{plan.gib:.1f}",
        one.cluster,
    ]
    return f"| {' | '.join(cells)} |"


def _script(example: str) -> str:
    family, name = example.split("/")
    return f"{family}/train_{name}.sh"
