"""Plant one piece of text in a copy of the project, run something there, take it out again.

What is run and what counts as seen is up to run.py, run_layouts.py and run_resume.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

ROOT = Path(__file__).parents[2]
COPIED = ("megatron", "tests", "tools", "docs", "examples", "pretrain_gpt.py", "pyproject.toml")


class Plant(Protocol):
    """One exact piece of text, which stands once in its file, and what to put in its place."""

    @property
    def name(self) -> str: ...

    @property
    def invariant(self) -> str: ...

    @property
    def file(self) -> str: ...

    @property
    def old(self) -> str: ...

    @property
    def new(self) -> str: ...


PlantT = TypeVar("PlantT", bound=Plant)


def chosen(
    plants: Iterable[PlantT], argv: Sequence[str] | None, description: str, example: str
) -> list[PlantT]:
    """Return the plants whose name or number has one of the words of ``argv``; all without any."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("words", nargs="*", help=f"of names, or numbers such as {example}")
    words = parser.parse_args(argv).words
    return [
        plant
        for plant in plants
        if not words or any(word in (plant.invariant, *plant.name.split()) for word in words)
    ]


def copy_project(to: Path) -> None:
    """Copy what tests need; nothing of it is compiled yet."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def planted(text: str, plant: Plant) -> str:
    """Return the source ``text`` with the plant in it."""
    times = text.count(plant.old)
    assert times == 1, f"{plant.name}: its text stands {times} times"
    return text.replace(plant.old, plant.new)


@contextmanager
def in_place(copy: Path, plant: Plant) -> Iterator[None]:
    """Have the plant in its file while the context lasts."""
    path = copy / plant.file
    text = path.read_text()
    path.write_text(planted(text, plant))
    try:
        yield
    finally:
        path.write_text(text)


def run_in(copy: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with ``words`` in the copy, which it imports from; nothing is left compiled."""
    return subprocess.run(
        [sys.executable, "-B", *words],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def say(line: str, *more: str) -> None:
    """Write a line, and more below it, indented."""
    sys.stdout.write("\n    ".join([line, *more]) + "\n")
    sys.stdout.flush()
