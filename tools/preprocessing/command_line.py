"""What the tools' command lines have in common: parsing, tokenizer flags, errors to exit codes.

No tool imports torch: help and errors must come at once.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from megatron.core.errors import MegatronError
from megatron.core.tokenizers.build_tokenizer import TOKENIZERS, TokenizerSettings
from megatron.core.tokenizers.tiktoken_tokenizer import PATTERNS

USER_ERROR = 2
INTERRUPTED = 130


class ToolParser(argparse.ArgumentParser):
    """Takes flags only in full, and suggests the nearest one for a flag it does not know."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )

    def parse_tool_args(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse, or leave with exit code 2 and a line that says what is wrong."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            word = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unknown: {' '.join(unknown)}{hint}")
        return args

    def error(self, message: str) -> NoReturn:
        """Leave with one line, without the usage, which would push it off the screen."""
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(USER_ERROR)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Answer flags of Megatron's that are not offered by name and with the reason."""
        for flag, reason in reasons.items():
            self.add_argument(flag, nargs="*", action=_Refuse, reason=reason)


class _Formatter(argparse.HelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default in (None, False, [], argparse.SUPPRESS) or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} (default: {shown})"


class _Refuse(argparse.Action):
    def __init__(self, reason: str, **kwargs: object) -> None:
        self._reason = reason
        super().__init__(default=None, help=argparse.SUPPRESS, **kwargs)  # type: ignore[arg-type]

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(
            f"{option_string} is a Megatron-LM flag this tool does not offer: {self._reason}"
        )


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number


def add_tokenizer_flags(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Offer the flags of ``TokenizerSettings``."""
    group = parser.add_argument_group("tokenizer")
    add = group.add_argument
    add("--tokenizer-type", choices=list(TOKENIZERS), required=required, help="Kind of tokenizer.")
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="SentencePiece .model, tokenizer.json or its folder, tiktoken vocabulary.",
    )
    add("--vocab-file", metavar="PATH", help="vocab.json of GPT2BPETokenizer.")
    add("--merge-file", metavar="PATH", help="merges.txt of GPT2BPETokenizer.")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="Ids of NullTokenizer (its end of document is one more) and of TikTokenizer.",
    )
    add("--tiktoken-pattern", choices=list(PATTERNS), help="How TikTokenizer cuts text.")
    add(
        "--tiktoken-num-special-tokens",
        type=int,
        default=1000,
        metavar="N",
        help="Ids in front of a JSON vocabulary of TikTokenizer.",
    )


def tokenizer_settings_of(args: argparse.Namespace) -> TokenizerSettings:
    """Return the tokenizer options of parsed ``add_tokenizer_flags``."""
    return TokenizerSettings(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        vocab_size=args.vocab_size,
        tiktoken_pattern=args.tiktoken_pattern,
        tiktoken_num_special_tokens=args.tiktoken_num_special_tokens,
    )


def run_tool(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and leave: 0, 2 with one message for what the user can mend, 130 if stopped."""
    name = os.path.basename(sys.argv[0])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        main()
    except MegatronError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # such as `| head`
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was left half written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)
