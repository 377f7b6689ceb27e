"""Show every option of a run, its value and its source, without starting it.

The same as ``pretrain_gpt.py --print-config``, with the notices of the start below:

    python tools/show_config.py --num-layers 12 --hidden-size 768 --data-path my_data
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.arguments import parse_args
from megatron.training.config.flags import build_parser
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig
from megatron.training.config.show import config_page
from megatron.training.user_errors import exit_on_user_error

DESCRIPTION = (
    "Show every option of a run, its value and its source, without starting it. Takes the options "
    "of pretrain_gpt.py, from the command line and --yaml-cfg, and names all that is wrong with "
    "them."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the options, or what is wrong with them and exit with code 2."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        parser = build_parser(options_of(RunConfig), "show_config.py")
        parser.description = DESCRIPTION
        print(parser.format_help(), end="")
        return
    with exit_on_user_error():
        config = parse_args(words)
    print(config_page(config, options_of(RunConfig)))
    print("\n".join(config.notices))


if __name__ == "__main__":
    main()
