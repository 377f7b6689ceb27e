"""Prove that a resumed run of yours is the unbroken run, with your own training flags.

    python tools/verify_resume.py --nproc 2 --iterations 8 -- YOUR FLAGS OF pretrain_gpt.py

Trains, kills all ranks with SIGKILL at a random moment, resumes from what lies on the disk, on
your layout and on others, and compares with a run that nobody disturbed. Exit code 0: the same;
1: something differs; 2: your flags. See docs/verify_resume.md.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import ConfigError
from megatron.training.user_errors import exit_on_user_error
from tools.resume.layouts import Asked, Other, asked, parse, propose
from tools.resume.settings import left_out, read_flags

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Prove it; see the module's text for the exit codes."""
    parser = _parser()
    own, words = split_words(sys.argv[1:] if argv is None else argv, parser)
    args = parser.parse_args(own)
    with exit_on_user_error(), ExitStack() as stack:
        given = read_flags(words)
        run = asked(words, given, args.nproc)
        others = _others(args, run)
        _check(args, run)
        folder = _folder(args.output, stack)
        if replaced := left_out(given):
            _tell(f"the proof has its own: {', '.join(replaced)}")
        from tools.resume import report
        from tools.resume.proof import prove

        settings = _settings(args, words, run, others, folder)
        proof = prove(settings, _tell)
        _tell(report.text(settings, proof))
        if args.json:
            Path(args.json).write_text(json.dumps(report.data(settings, proof), indent=1) + "\n")
        return 0 if proof.passes else 1


def split_words(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[list[str], list[str]]:
    """Cut the command line into the tool's options, which come first, and the training flags.

    The first word ``--``, or else the first flag that is not the tool's, begins the training flags.
    """
    words = list(argv)
    if "--" in words:
        at = words.index("--")
        return words[:at], words[at + 1 :]
    known = {flag for action in parser._actions for flag in action.option_strings}
    for at, word in enumerate(words):
        if word.startswith("--") and word.partition("=")[0] not in known:
            return words[:at], words[at:]
    return words, []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python tools/verify_resume.py [options] -- training flags",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nproc", type=_at_least_1, default=1, metavar="N", help="ranks (default: 1)")
    add(
        "--iterations",
        type=_at_least_1,
        default=8,
        metavar="N",
        help="steps of the unbroken run (default: 8); the schedule is that of your --train-iters",
    )
    add(
        "--save-every",
        type=_at_least_1,
        metavar="N",
        help="iterations between checkpoints (default: a quarter of --iterations)",
    )
    add(
        "--seed", type=int, default=1, metavar="N", help="draws the moment of the kill (default: 1)"
    )
    add(
        "--layouts",
        nargs="+",
        default=["auto"],
        metavar="LAYOUT",
        help="other layouts to resume on: auto (default), none, or ranks and sizes: 1 4,tp=2,ep=2",
    )
    add(
        "--max-ranks",
        type=_at_least_1,
        default=4,
        metavar="N",
        help="ranks of a layout that auto proposes, at most (default: 4)",
    )
    add("--script", default=str(ROOT / "pretrain_gpt.py"), metavar="FILE", help="your own script")
    add("--output", metavar="DIR", help="keep logs, records and checkpoints there")
    add("--json", metavar="FILE", help="write the report there as JSON")
    return parser


def _others(args: argparse.Namespace, run: Asked) -> list[Other]:
    if args.layouts == ["none"]:
        return []
    if args.layouts == ["auto"]:
        return propose(run, args.max_ranks)
    found, problems = [], []
    for text in args.layouts:
        try:
            found.append(parse(run, text))
        except ConfigError as error:
            problems.append(str(error))
    ConfigError.raise_if_any(problems)
    return found


def _check(args: argparse.Namespace, run: Asked) -> None:
    """Refuse what leaves no room for a save, a kill and a step after it."""
    steps = min(args.iterations, run.config.training.train_iters)
    problems = []
    if steps < 3:
        problems.append(
            f"--iterations {args.iterations} of --train-iters {run.config.training.train_iters}: "
            "at least 3 steps are needed, to save, to be killed and to go on"
        )
    elif (args.save_every or 1) > steps - 2:
        problems.append(
            f"--save-every {args.save_every} must leave 2 steps of {steps} after the first save"
        )
    if not Path(args.script).is_file():
        problems.append(f"--script {args.script}: there is no such file")
    ConfigError.raise_if_any(problems)


def _settings(
    args: argparse.Namespace, words: list[str], run: Asked, others: list[Other], folder: Path
):
    from tools.resume.proof import Settings

    steps = min(args.iterations, run.config.training.train_iters)
    return Settings(
        script=Path(args.script).resolve(),
        words=words,
        world_size=args.nproc,
        iterations=steps,
        train_iters=run.config.training.train_iters,
        save_interval=args.save_every or max(1, min(steps // 4, steps - 2)),
        seed=args.seed,
        folder=folder,
        optimizer=run.config.optimizer.optimizer,
        precision=run.config.model.params_dtype_name,
        others=others,
    )


def _folder(output: str | None, stack: ExitStack) -> Path:
    """Return an empty folder, one that goes away again when the user named none."""
    if output is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="verify-resume-")))
    folder = Path(output).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output {output} is not empty; name another folder")
    return folder


def _at_least_1(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _end(number: int, _frame: object) -> None:
    """End as after an error, so that no rank outlives the tool."""
    raise SystemExit(128 + number)


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
