"""A real corpus from what every machine has: the source of Python's standard library.

Writes JSON lines of ``{"text", "path"}``, a document per file, shuffled by a hash of the path so
that a split by documents is fair and the same on every machine with the same Python.
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import DataError
from tools.preprocessing import command_line

MEGABYTE = 1_000_000
ENOUGH_MEGABYTES = 10
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
# They hold files in odd encodings and generated tables; used only if the rest is too small.
TESTS = {"test", "tests", "idle_test"}


class Document(NamedTuple):
    """A source file."""

    path: str  # from the folder of the library
    text: str


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    library = Path(args.library or sysconfig.get_paths()["stdlib"])
    if not library.is_dir():
        raise DataError(f"--library {library} is not a folder")
    documents = list(source_files(library, with_tests=False))
    if _size(documents) < ENOUGH_MEGABYTES * MEGABYTE:
        documents = list(source_files(library, with_tests=True))
    if not documents:
        raise DataError(f"no Python source in {library}; name a folder with --library")
    documents.sort(key=lambda document: shuffle_key(document.path, args.seed))
    target = Path(args.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "path": document.path}) + "\n")
    os.replace(partial, target)
    megabytes = _size(documents) / MEGABYTE
    print(f"Wrote {target}: {len(documents)} documents, {megabytes:.1f} MB of source of {library}")
    if megabytes < ENOUGH_MEGABYTES:
        print(
            f"warning: only {megabytes:.1f} MB, less than {ENOUGH_MEGABYTES}: this Python has an "
            "incomplete library; add a folder of Python source with --library",
            file=sys.stderr,
        )


def source_files(library: Path, *, with_tests: bool) -> Iterator[Document]:
    """Yield every non-empty .py file in UTF-8 below ``library``, sorted by path.

    Line ends are kept as they are. Files in other encodings are left out.
    """
    left_out = NOT_THE_LIBRARY if with_tests else NOT_THE_LIBRARY | TESTS
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if left_out & set(relative.parts[:-1]) or not path.is_file():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(relative.as_posix(), text)


def shuffle_key(path: str, seed: int) -> str:
    """Return what documents are sorted by: a hash, so that adding one moves no other."""
    return hashlib.sha256(f"{seed}/{path}".encode()).hexdigest()


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Gather the source text of Python's standard library.")
    parser.add_argument("--output", required=True, metavar="PATH", help="The .jsonl to write.")
    parser.add_argument("--library", metavar="PATH", help="Another folder of Python source.")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="Of the shuffle.")
    return parser.parse_tool_args(argv)


if __name__ == "__main__":
    command_line.run_tool(main)
