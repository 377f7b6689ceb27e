"""Write docs/flags.md and the list of files in docs/map.md: ``python tools/write_docs.py``.

Flags come from the declarations of the options, files from their own first sentences. ``--check``
writes nothing and exits with code 1 if a page is not up to date.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.config.flags import ACTIONS
from megatron.training.config.megatron_flags import NO_EFFECT
from megatron.training.config.options import Option, options_of
from megatron.training.config.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
FLAGS, MAP = ROOT / "docs" / "flags.md", ROOT / "docs" / "map.md"
_BEGIN, _END = "<!-- files: written by tools/write_docs.py -->\n", "<!-- end of files -->\n"
_OPENING = """\
# Flags

Written by `tools/write_docs.py` from the config dataclasses; edit those, then run `make docs`.
Every option may stand on the command line or, by the name of its flag without dashes or of its
field, in the file of `--yaml-cfg`. The command line goes before the file, the file before the
default. `-` as default: derived or absent, as the text says. `off` and `on` are switches; of one
that is on, the flag turns it off. How this differs from Megatron-LM: [differences](differences.md).
"""


def flags_page() -> str:
    """Return the content of docs/flags.md."""
    groups: dict[str, list[Option]] = {}
    for option in options_of(RunConfig).values():
        groups.setdefault(option.group, []).append(option)
    parts = [_OPENING, "## General\n", "| flag | what it does |", "|---|---|"]
    parts += [f"| `{flag}` | {text} |" for flag, text in ACTIONS.items()]
    for group, members in groups.items():
        files = sorted({f"`{option.module.replace('.', '/')}.py`" for option in members})
        parts += ["", f"## {group}\n", f"Declared in {', '.join(files)}.\n"]
        parts += ["| flag | default | what it does |", "|---|---|---|"]
        parts += [_row(option) for option in members]
    parts += ["", "## Accepted without effect\n"]
    parts += ["Old launch scripts pass them; a notice says why they change nothing.\n"]
    parts += ["| flag | only with | why |", "|---|---|---|"]
    for flag, entry in sorted(NO_EFFECT.items()):
        parts.append(f"| `{flag}` | {', '.join(entry.values or ())} | {entry.why} |")
    return "\n".join(parts) + "\n"


def map_page() -> str:
    """Return docs/map.md with its list of files made anew."""
    before, _, rest = MAP.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    folders: dict[Path, list[Path]] = {}
    for top in ("megatron", "tools"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if path.name != "__init__.py":
                folders.setdefault(path.parent.relative_to(ROOT), []).append(path)
    lines = []
    for folder, paths in sorted(folders.items()):
        lines += [f"**{folder}**\n"]
        lines += [f"- `{path.relative_to(ROOT)}` {_first_sentence(path)}" for path in paths]
        lines += [""]
    return before + _BEGIN + "\n" + "\n".join(lines) + _END + after


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].replace("``", "`").split())
    return paragraph.replace("`", "")


def _row(option: Option) -> str:
    flags = ", ".join(f"`{flag}`" for flag in option.flags)
    text = f"Turn off: {option.help}" if option.default is True else option.help
    if option.choices:
        text += f" One of: {', '.join(f'`{choice}`' for choice in option.choices)}."
    escaped = text.replace("|", "\\|")
    return f"| {flags} | {_default(option)} | {escaped} |"


def _default(option: Option) -> str:
    if option.kind is bool:
        return "on" if option.default else "off"
    return "-" if option.default is None else f"`{option.text(option.default)}`"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Only compare.")
    pages = {FLAGS: flags_page(), MAP: map_page()}
    if parser.parse_args(argv).check:
        stale = [path for path, page in pages.items() if _read(path) != page]
        for path in stale:
            print(f"{path} is not up to date: run python tools/write_docs.py", file=sys.stderr)
        return int(bool(stale))
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    raise SystemExit(main())
