"""The command line: words -> option values, and --help. Every problem is collected, none raised."""

import argparse
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron.training.config.megatron_flags import answer, megatron_flags
from megatron.training.config.options import Option, close_words

ACTIONS = {
    "--help": "Show this text and exit.",
    "--version": "Show the version and exit.",
    "--print-config": "Show every option of the run, its value and its source, and exit.",
    "--yaml-cfg": "YAML file of options, by flag name; the command line goes before it.",
}
"""Flags that are no options of a run; only --yaml-cfg has a value, the name of a file."""


@dataclass
class Given:
    """What one source, the command line or a YAML file, says."""

    values: dict[str, Any] = field(default_factory=dict)
    """Option name -> value."""
    actions: dict[str, str] = field(default_factory=dict)
    """Of ``ACTIONS``: flag -> its value, or nothing."""
    without_effect: set[str] = field(default_factory=set)
    """Accepted flags that change nothing."""
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    readable: bool = True
    """False when what it says is not known: then nothing can be called missing."""
    doubtful: set[str] = field(default_factory=set)
    """Flags whose value was unreadable or may be meant by a misspelt one: say no more of them."""


def read_command_line(argv: Iterable[str], options: dict[str, Option]) -> Given:
    """Read ``argv`` (without the program's name); of a flag given twice the last one holds."""
    given = Given()
    by_flag = {flag: option for option in options.values() for flag in option.flags}
    inverse = {flag: option for option in options.values() for flag in option.inverse}
    for flag, words in _chunks(argv, given):
        if flag in ACTIONS:
            _read_action(given, flag, words)
        elif flag in by_flag:
            _read_option(given, flag, words, by_flag[flag])
        elif flag in inverse and not words:
            given.values[inverse[flag].name] = inverse[flag].default
        else:
            note_foreign(given, flag, words, by_flag)
    return given


def note_foreign(given: Given, flag: str, words: list[str], known: Iterable[str]) -> None:
    """Note a flag that is no option: accepted, refused by name, or unknown with a suggestion."""
    reply = answer(flag, words)
    if reply is None:
        _note_unknown(given, flag, known)
    elif reply.accepted:
        given.without_effect.add(flag)
        given.notices.append(reply.text)
    else:
        given.problems.append(reply.text)


def _note_unknown(given: Given, flag: str, known: Iterable[str]) -> None:
    ours = close_words(flag, [*known, *ACTIONS])
    near = ours or close_words(flag, megatron_flags(), most=1)
    given.doubtful.update(ours)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    given.problems.append(f"{flag} is unknown; {hint}")


def _chunks(argv: Iterable[str], given: Given) -> Iterator[tuple[str, list[str]]]:
    """Cut the words into (flag, words after it); ``--flag=word`` is one word after it."""
    flag: str | None = None
    words: list[str] = []
    for word in argv:
        if word == "-h" or word.startswith("--"):
            if flag is not None:
                yield flag, words
            flag, equals, value = word.partition("=")
            flag, words = ("--help" if flag == "-h" else flag), ([value] if equals else [])
        elif flag is None:
            given.problems.append(f"{word!r} stands before the first flag; options begin with --")
        else:
            words.append(word)
    if flag is not None:
        yield flag, words


def _read_action(given: Given, flag: str, words: list[str]) -> None:
    wanted = 1 if flag == "--yaml-cfg" else 0
    if len(words) != wanted:
        what = "needs one value, the name of a file" if wanted else "takes no value"
        given.problems.append(f"{flag} {what}")
        return
    given.actions[flag] = words[0] if words else ""


def _read_option(given: Given, flag: str, words: list[str], option: Option) -> None:
    try:
        given.values[option.name] = option.from_texts(words)
    except ValueError as error:
        given.problems.append(f"{' '.join([flag, *words])}: {error}")
        given.doubtful.update(option.flags)


class _Formatter(argparse.HelpFormatter):
    """Keep flags whole where a line is broken."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def build_parser(options: dict[str, Option], program: str = "pretrain_gpt.py") -> Any:
    """Return an ``argparse.ArgumentParser`` that knows every option: for --help and completion."""
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [options]",
        add_help=False,
        allow_abbrev=False,
        formatter_class=lambda prog: _Formatter(prog, max_help_position=34, width=100),
        description="Train a GPT or Mixture-of-Experts model. Started by python or torchrun.",
        epilog="Options come from the command line, then --yaml-cfg, then defaults. A switch that "
        "the YAML file turns on is turned off by --no- before its name.",
    )
    general = parser.add_argument_group("General")
    for flag, text in ACTIONS.items():
        if flag == "--yaml-cfg":
            general.add_argument(flag, metavar="FILE", help=text)
        else:
            names = ("-h", flag) if flag == "--help" else (flag,)
            general.add_argument(*names, action="store_true", help=text)
    groups: dict[str, Any] = {}
    for option in options.values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        groups[option.group].add_argument(*option.flags, **_argparse_keywords(option))
    return parser


def _argparse_keywords(option: Option) -> dict[str, Any]:
    keywords: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    text = help_text(option).replace("%", "%%")
    if option.kind is bool:
        action = "store_false" if option.default else "store_true"
        return keywords | {"action": action, "help": text}
    metavar = {int: "N", float: "X", str: "NAME" if option.choices else "TEXT"}[option.kind]
    if option.choices:
        text += f" One of: {', '.join(option.choices)}."
    if option.is_list and option.parse is None:
        keywords["nargs"] = "+"
    return keywords | {"metavar": metavar, "help": text}


def help_text(option: Option) -> str:
    """Return the option's help, as seen from its flag, with the default."""
    if option.kind is bool:
        return f"Turn off: {option.help}" if option.default else option.help
    if option.default is None:
        return option.help
    return f"{option.help} (default: {option.text(option.default)})"


def help_page(options: dict[str, Option], program: str = "pretrain_gpt.py") -> str:
    """Return what --help prints."""
    return str(build_parser(options, program).format_help())
