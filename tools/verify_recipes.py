"""Prove the examples: full-size plans against published sizes, and toys that train on this machine.

    python tools/verify_recipes.py                          all of them: many minutes
    python tools/verify_recipes.py --only 'qwen/*'          some
    python tools/verify_recipes.py --skip-plans             toys alone

Ends with 1 when a size differs from the published one, ranks would stand still or a loss does not
fall.
"""

import argparse
import fnmatch
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.recipes.published import PUBLISHED
from tools.recipes.runs import ExampleError, Plan, Toy, kept, plan, toy
from tools.recipes.table import page, plan_line, problems_of, toy_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; 1 when one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", metavar="PATTERN", default="*", help="examples of such names")
    parser.add_argument("--skip-plans", action="store_true", help="train the toys alone")
    parser.add_argument("--skip-toys", action="store_true", help="look at the plans alone")
    parser.add_argument(
        "--results", metavar="FOLDER", help="keep what was found there, and do not find it again"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the page; needs all of them")
    args = parser.parse_args(argv)
    chosen = [one for one in PUBLISHED if fnmatch.fnmatch(one.example, args.only)]
    if not chosen:
        names = ", ".join(one.example for one in PUBLISHED)
        parser.error(f"--only {args.only}: no example has such a name; there are {names}")
    if args.markdown and (len(chosen) < len(PUBLISHED) or args.skip_plans or args.skip_toys):
        parser.error("--markdown needs all examples, their plans and their toys")
    begun, problems = time.monotonic(), []
    plans: dict[str, Plan] = {}
    toys: dict[str, Toy] = {}
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        for one in chosen:
            try:
                if not args.skip_plans:
                    found = plans[one.example] = kept(
                        Plan, args.results, one.example, partial(plan, one.example, Path(folder))
                    )
                    problems += problems_of(one, found)
                    print(plan_line(one.example, found), flush=True)
                if not args.skip_toys:
                    run = toys[one.example] = kept(
                        Toy, args.results, one.example, partial(toy, one.example)
                    )
                    print(toy_line(one.example, run), flush=True)
                    if not run.last_loss < run.first_loss:
                        problems.append(f"{one.example} --toy: the loss does not fall")
            except ExampleError as error:
                problems.append(str(error))
                print(f"FAILED {error}", flush=True)
    minutes = (time.monotonic() - begun) / 60
    summary = f"{len(chosen)} examples in {minutes:.0f} minutes: {len(problems)} problems."
    print("".join(f"WRONG {problem}\n" for problem in problems) + summary)
    if args.markdown and not problems:
        Path(args.markdown).write_text(page(plans, toys, PUBLISHED, summary))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
