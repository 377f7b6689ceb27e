"""Prove that a checkpoint of any layout goes on at any other: save at each, load at each.

    python tools/verify_reshard.py                        all pairs: minutes
    python tools/verify_reshard.py --quick                a few that change every axis both ways
    python tools/verify_reshard.py --model tied --from 'pp2*' --to '*zero3*'

Ranks are processes of this machine, over gloo, on CPU. Ends with 1 when a pair is wrong, and says
which tensor is wrong first, where, and both values.
"""

import argparse
import fnmatch
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import ConfigError
from megatron.training.user_errors import exit_on_user_error
from tools.reshard.layouts import MODELS, QUICK, Model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs; 1 when one of them is wrong."""
    args = _parse(argv)
    names = args.model or list(MODELS)
    is_whole = not (args.quick or args.source or args.target)
    with exit_on_user_error():
        if args.markdown and not is_whole:
            raise ConfigError("--markdown needs all pairs of a model: leave out what chooses some")
        pairs = {name: _pairs(MODELS[name], args) for name in names}
        if not any(pairs.values()):
            raise ConfigError("--from and --to: no pair of layouts has such names")
    from tools.reshard import table
    from tools.reshard.proof import Proof
    from tools.reshard.refusals import refused, tried_loads

    with tempfile.TemporaryDirectory(prefix="reshard-") as folder:
        proofs = []
        for name in names:
            if pairs[name]:
                proofs.append(Proof(MODELS[name], Path(folder) / name, pairs=pairs[name]))
                for line in proofs[-1].run():
                    print(f"{name}: {line}", flush=True)
        refusals = [*refused(), *tried_loads(Path(folder))]
    let_in = [f"{one.what}: was not refused" for one in refusals if not one.said]
    problems = [problem for proof in proofs for problem in proof.problems] + let_in
    minutes = sum(proof.seconds for proof in proofs) / 60
    print(f"{table.summary(proofs)}; {minutes:.1f} minutes")
    print("".join(f"WRONG {problem}\n" for problem in problems), end="")
    if args.markdown:
        table.write_between_markers(Path(args.markdown), table.sections(proofs, refusals))
    return int(bool(problems))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", choices=MODELS, action="append", help="this one alone (may be repeated)")
    add("--quick", action="store_true", help="a few pairs that change every axis both ways")
    add("--from", dest="source", metavar="PATTERN", help="layouts that save, with * and ?")
    add("--to", dest="target", metavar="PATTERN", help="layouts that load, with * and ?")
    add("--markdown", metavar="FILE", help="put its tables between the markers of this page")
    return parser.parse_args(argv)


def _pairs(model: Model, args: argparse.Namespace) -> list[tuple[str, str]]:
    names = [layout.name for layout in model.layouts]
    every = [(a, b) for a in names for b in names]
    return [
        (a, b)
        for a, b in (QUICK[model.name] if args.quick else every)
        if fnmatch.fnmatch(a, args.source or "*") and fnmatch.fnmatch(b, args.target or "*")
    ]


if __name__ == "__main__":
    sys.exit(main())
