"""Prove that upcycling keeps the function: four dense families, copies and slices, every top-k.

    python tools/verify_upcycling.py                      all: minutes
    python tools/verify_upcycling.py --family llama       of one family

Ends with 1 when a receipt is not at rounding, or one that should not be is.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron.training.upcycling.preservation import Recipe
from tools.checkpoint.upcycle_receipt import ALLOWED, Receipt
from tools.upcycling.dense_models import FAMILIES, TITLES, save_dense
from tools.upcycling.proof import EXPERTS, Case, cases, proved

BEGIN = "<!-- made by `make verify-upcycling`: begin -->"
END = "<!-- made by `make verify-upcycling`: end -->"
_CHANGED = {
    "noise 0.01": Recipe(noise=0.01),
    "drop 0.5 (drop-upcycling)": Recipe(drop=0.5),
    "router rows of 0.02 under softmax over all": Recipe(router_std=0.02),
}
"""What must not pass as kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; 1 when one of them is wrong."""
    args = _parse(argv)
    begin, problems = time.perf_counter(), []
    sections = []
    with tempfile.TemporaryDirectory(prefix="upcycling-") as folder:
        for family in args.family or list(FAMILIES):
            dense = Path(folder) / family
            save_dense(dense, family)
            kept = {}
            for number, case in enumerate(cases()):
                receipt = kept[case] = proved(dense, dense / f"case{number}", case)
                print(f"{family}: {case}: {receipt.verdict}", flush=True)
                problems += [] if receipt.kept else [f"{family}: {case}"]
            changed = _changed(dense)
            problems += [
                f"{family}: {name} passes as kept" for name, r in changed.items() if r.kept
            ]
            sections.append(_section(family, kept, changed))
    seconds = time.perf_counter() - begin
    print("".join(f"WRONG {problem}\n" for problem in problems), end="")
    print(f"{seconds:.0f} s")
    if args.markdown and not problems:
        _write(Path(args.markdown), sections)
    return int(bool(problems))


def _changed(dense: Path) -> dict[str, Receipt]:
    case = Case(granularity=1, copies=2, score="softmax over all")
    return {
        name: proved(dense, dense / f"changed{number}", case, recipe)
        for number, (name, recipe) in enumerate(_CHANGED.items())
    }


def _section(family: str, kept: dict[Case, Receipt], changed: dict[str, Receipt]) -> str:
    any_receipt = next(iter(kept.values()))
    rows = [
        f"**{TITLES[family]}.** Rounding {any_receipt.rounding:.1e}, largest logit "
        f"{any_receipt.largest_logit:.2f}, perplexity {any_receipt.perplexity_before:.4f}.",
        "",
        "| experts | top-k | score | max | mean | KL | perplexity - before | busiest | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, receipt in kept.items():
        how = f"{case.granularity} slices" if case.granularity > 1 else "copies"
        what = how + (", folded" if case.fold else "")
        rows.append(f"| {what} | {case.topk} of {EXPERTS} | {case.score} | {_figures(receipt)} |")
    for name, receipt in changed.items():
        rows.append(f"| {name} | 2 of {EXPERTS} | softmax over all | {_figures(receipt)} |")
    return "\n".join(rows)


def _figures(receipt: Receipt) -> str:
    change = receipt.perplexity_after - receipt.perplexity_before
    word = "kept" if receipt.kept else "NOT KEPT" if receipt.is_wrong else "changed"
    cells = (
        f"{receipt.max_logit_difference:.1e}",
        f"{receipt.mean_logit_difference:.1e}",
        f"{receipt.kl_divergence:.1e}",
        f"{change:+.1e}",
        f"{receipt.busiest_expert:.1f}",
        word,
    )
    return " | ".join(cells)


def _write(page: Path, sections: Sequence[str]) -> None:
    intro = (
        f"{EXPERTS} experts, fp32, text: the source of Python's standard library as bytes. *Max* "
        "and *mean* are differences of logits, *KL* is in nats a token, *busiest* the tokens of "
        f"the busiest expert over the mean. Kept: max is at most {ALLOWED:g} times the rounding. "
        f"torch {torch.__version__}."
    )
    text = page.read_text(encoding="utf-8")
    block = "\n\n".join([BEGIN, intro, *sections, END])
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"{page} needs one pair of markers"
    page.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="Only this one.")
    parser.add_argument("--markdown", metavar="PAGE", help="Write the figures into this page.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
