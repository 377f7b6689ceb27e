"""Prove the exchange with Hugging Face, every family on every layout: `make verify-hf`.

    python -m tests.parity.run_hf [--only PATTERN] [--markdown docs/hf_proofs.md]

Ends with 1 when something is wrong, and says what. Figures are those of this run.
"""

import argparse
import fnmatch
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron.core.errors import ConfigError
from tests.helpers.hf_cases import CASES
from tests.helpers.hf_proof import (
    LAYOUTS,
    LOGITS,
    ONE,
    RELATIVE,
    Apart,
    Imported,
    apart,
    check_round_trip,
    check_round_trip_in_bf16,
    imported,
    layouts_of,
    refuse_other_start,
    run,
)
from tests.helpers.hf_table import Outcome, write_page

DTYPES = (torch.float32, torch.float64)


def main(argv: Sequence[str] | None = None) -> int:
    """Prove the cases; 1 when one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases, with * and ?")
    parser.add_argument("--markdown", metavar="FILE", help="write the page of proofs, of all cases")
    args = parser.parse_args(argv)
    names = [name for name in CASES if fnmatch.fnmatch(name, args.only)]
    if not names or (args.markdown and names != list(CASES)):
        parser.error("no case has such a name" if not names else "--markdown needs all cases")
    torch.set_num_threads(1)
    begin = time.monotonic()
    outcomes = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="hf-") as folder:
            outcomes.append(prove(name, Path(folder)))
        _say(outcomes[-1].line())
    wrong = [f"{one.name}: {problem}" for one in outcomes for problem in one.problems]
    _say(*(f"WRONG {problem}" for problem in wrong))
    _say(f"{len(outcomes)} cases, {len(wrong)} problems, {time.monotonic() - begin:.0f} s")
    if args.markdown:
        write_page(Path(args.markdown), outcomes)
    return int(bool(wrong))


def prove(name: str, folder: Path) -> Outcome:
    """Prove one case; what is wrong is in the outcome."""
    outcome = Outcome(name, CASES[name])
    try:
        case = imported(name, folder / "case")
    except (ConfigError, RuntimeError, AssertionError) as error:
        outcome.problems.append(f"import: {_last_line(error)}")
        return outcome
    for layout in ("one", *layouts_of(name)):
        outcome.apart[layout] = {}
        for dtype, found in _figures(case, layout, outcome):
            outcome.apart[layout][dtype] = found
            if found.logits > LOGITS[dtype] or found.relative > RELATIVE[dtype]:
                outcome.problems.append(f"{layout}, {dtype}: {found}")
    for what, check in (
        ("fp32", lambda: check_round_trip(case, folder / "again")),
        ("bf16", lambda: check_round_trip_in_bf16(name, folder / "bf16")),
    ):
        try:
            outcome.bit_equal[what] = check()
        except (ConfigError, RuntimeError, AssertionError) as error:
            outcome.problems.append(f"round trip in {what}: {_last_line(error)}")
    return outcome


def _figures(case: Imported, layout: str, outcome: Outcome) -> Iterator[tuple[torch.dtype, Apart]]:
    on = LAYOUTS.get(layout, ONE)
    try:
        runs = run(case, on, DTYPES)
        for dtype, ours in zip(DTYPES, runs, strict=True):
            yield dtype, apart(case.theirs[dtype], ours)
        refuse_other_start(case, on, runs[0])
    except (ConfigError, RuntimeError, AssertionError) as error:
        outcome.problems.append(f"{layout}: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
